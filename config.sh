# shellcheck shell=bash
# The only file to edit. Every value can also be given in the environment:
#   Main_Data_Path=/data/hald IPC=50 SLC=150 bash scripts/run_imagenet.sh

# Distilled images, label sets and pretrained models:
#   $Main_Data_Path/generated_data/syn_data/<dataset>/<method>_ipc<ipc>/      distilled images
#   $Main_Data_Path/generated_data/new_labels/<dataset>/...                   label sets
#   $Main_Data_Path/<teacher>.pth                                             teacher weights
export Main_Data_Path="${Main_Data_Path:-}"

# Validation images: $val_dir/<dataset>/<class>/*.JPEG
export val_dir="${val_dir:-}"
