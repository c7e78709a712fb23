# shellcheck shell=bash
# The only file to edit. Every value can be given in the environment instead:
#   Main_Data_Path=/data/hald val_dir=/data/val IPC=50 bash scripts/run_imagenet.sh

# Distilled images, label sets, pretrained teachers and runs:
#   $Main_Data_Path/generated_data/syn_data/<dataset>/<METHOD>_ipc<IPC>/               images
#   $Main_Data_Path/generated_data/new_labels/<dataset>/<METHOD>_bs16_slc<SLC>_ipc<IPC>/  labels
#       (published ones there; those made here in codec fp16 too, in others with _<CODEC> behind)
#   $Main_Data_Path/<TEACHER>.pth                                    teacher weights, if local
#   $Main_Data_Path/runs/<dataset>/...                                                 students
export Main_Data_Path="${Main_Data_Path:-}"

# Validation images: $val_dir/<dataset>/<class>/*.JPEG
export val_dir="${val_dir:-}"

METHOD="${METHOD:-fadrm}"              # how the images were distilled: fadrm, sre2l, lpld, rded, ...
IPC="${IPC:-10}"                       # distilled images per class
SLC="${SLC:-150}"                      # soft labels per class, a multiple of IPC
BATCH_SIZE="${BATCH_SIZE:-16}"
CODEC="${CODEC:-klt}"                  # how labels are stored; fp16 keeps the published precision
TEACHER="${TEACHER:-ResNet18}"
TEACHER_WEIGHTS="${TEACHER_WEIGHTS:-}" # a file; default $Main_Data_Path/$TEACHER.pth or torchvision's
MODEL="${MODEL:-ResNet18}"             # the student
SCHEDULE="${SCHEDULE:-hald}"
SOFT_EPOCHS="${SOFT_EPOCHS:-}"         # of a schedule given by name: a number (150), or auto
HARD_EPOCHS="${HARD_EPOCHS:-}"         # likewise
SEED="${SEED:-0}"                      # of the student
WORKERS="${WORKERS:-4}"                # processes that decode images
GPUS="${GPUS:-all}"                    # GPUs that label: all that are visible, or a number
TRAIN_GPUS="${TRAIN_GPUS:-1}"          # GPUs that train the student: each adds a batch per step,
                                       # so that more than one is no longer the published recipe
