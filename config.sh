# shellcheck shell=bash
# The only file to edit. The environment overrides what stands here:
#   Main_Data_Path=/data/hald val_dir=/data/val IPC=50 bash scripts/run_imagenet.sh

# Distilled images, label sets, pretrained teachers and runs:
#   $Main_Data_Path/generated_data/syn_data/<dataset>/<METHOD>_ipc<IPC>/               images
#   $Main_Data_Path/generated_data/new_labels/<dataset>/<METHOD>_bs16_slc<SLC>_ipc<IPC>/  labels
#       (published ones there, imported with _imported behind; those made here with _<CODEC>,
#       TEACHER, RECIPE and RELABEL_FLAGS behind, as far as they are not fp16, ResNet18, published
#       and none)
#   $Main_Data_Path/<dataset>/<TEACHER>.pth, else $Main_Data_Path/<TEACHER>.pth   teacher weights
#   $Main_Data_Path/runs/<dataset>/...                                                 students
# imagenette may be called imagenet-nette, as in the published data.
export Main_Data_Path="${Main_Data_Path:-}"

# Validation images: $val_dir/<dataset>/<class>/*.JPEG
export val_dir="${val_dir:-}"

# Further settings with their defaults; remove the # in front to change one.
# METHOD=fadrm        # how the images were distilled: fadrm, sre2l, lpld, rded, ...; rded, for
#                     # selected images, is what labels without BSSL
# IPC=10              # distilled images per class
# SLC=150             # soft labels per class, a multiple of IPC
# BATCH_SIZE=16
# CODEC=klt           # how labels are stored; fp16 keeps the published precision
# TEACHER=ResNet18
# TEACHER_WEIGHTS=    # a file; default as above, then torchvision's
# MODEL=ResNet18      # the student
# RECIPE=published    # or auto: which views get a label by what the teacher knows, and how a student
#                     # trains on them (analysis/study.md: small data, selected images, no BSSL); of
#                     # published labels, only the training
# SCHEDULE=           # instead of the recipe's; published has hald. Fresh views of hard epochs are as
#                     # large as those of the labels
# SOFT_EPOCHS=        # of a schedule given by name: a number (default 150), or auto
# HARD_EPOCHS=        # likewise
# SEED=0              # of the student
# WORKERS=4           # processes that decode images
# GPUS=all            # GPUs that label: all that are visible, or a number
# RELABEL_FLAGS=      # further flags of relabel/generate.py: RELABEL_FLAGS="--min-scale 0.2"
# RUN_NAME=           # folder of the run in runs/<dataset>/; default: a name of all that decides it
# TRAIN_GPUS=1        # GPUs that train the student: each adds a batch per step, so that more than
#                     # one is no longer the published recipe
