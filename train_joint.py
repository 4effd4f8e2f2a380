"""Train SC-EGG in one run: LEN + GEN, scaler, distillation, EGGN with its evaluation.

python train_joint.py                    the built-in TOY dataset
python train_joint.py --dataset CUB      the same as train_joint_CUB.py
python train_joint_CUB.py --seed 1       any key of the config is a flag
python train_joint_CUB.py --resume       continue the last run that was stopped or killed
"""

from scegg.report.figures import report_run
from scegg.run.main import main as run_main
from util import exit_on_user_error


def main(argv=None, dataset: str | None = None):
    """One run. dataset: that of a script which names it; None: --dataset does."""
    run_main(argv, dataset, report=report_run)


if __name__ == "__main__":
    exit_on_user_error(main)
