"""Train SC-EGG in one run: LEN + GEN, scaler, distillation, EGGN with its evaluation.

    python train_joint.py                    the built-in TOY dataset
    python train_joint.py --dataset CUB      the same as train_joint_CUB.py
    python train_joint_CUB.py --seed 1       any key of the config is a flag
    python train_joint_CUB.py --resume       go on with the last run that was stopped or killed
"""

from scegg.run.main import main
from util import exit_on_user_error

if __name__ == "__main__":
    exit_on_user_error(main)
