"""Train SC-EGG on SUN: train_joint.py with its dataset named."""

from train_joint import main
from util import exit_on_user_error

if __name__ == "__main__":
    exit_on_user_error(lambda: main(dataset="SUN"))
