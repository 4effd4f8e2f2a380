"""Train SC-EGG on CUB: python train_joint_CUB.py [--config FILE] [--any_key value]; the procedure is train_joint.py's."""
from train_joint import main
from util import exit_on_user_error

if __name__ == "__main__":
    exit_on_user_error(lambda: main("CUB", "cub_gzsl.yaml"))
