"""How fast every stage is: `python -m benchmarks`, see __main__.py for its flags.

machine         time and memory of a call, and what this machine can do at most
flop            the arithmetic and the traffic that a stage cannot do without
stages          Stage, and the tensors and networks that the stages work on
training        stages: SCEN, distillation, EGGN
evaluation      stage: the softmax classifiers
files           stages: feature files and the backbone
table           measure the stages and print them
preprocessing   images a second of preprocessing.py
shared_machine  a stage beside another program, by how long waiting threads spin
whole_runs      whole training runs, in a process of their own
plain_run       a whole run of scegg/method/plain.py
gpu             all that a GPU has to show, by one command
"""

import scegg  # noqa: F401, before torch: it sets what that reads when it is loaded
