"""One run of SC-EGG: SCEN (LEN + GEN), scaler, distillation, EGGN with evaluation; TOY by default.

    python train_joint.py                  the embedded TOY dataset
    python train_joint_CUB.py --seed 1     a dataset of the paper; any key of its config is a flag
    python train_joint_CUB.py --resume     go on with the last run that was stopped or killed
"""
from scegg.run.main import main
from util import exit_on_user_error

if __name__ == "__main__":
    exit_on_user_error(lambda: main("TOY", "toy.yaml"))
