"""All that a GPU has to show, by one command: `python -m benchmarks.gpu`, see docs/gpu.md.

__main__        the command: its flags, and the parts one after the other
parts           which parts there are; each runs in a process of its own, with a time limit
part            that process
record          what is known of a card, as JSON
page            the same as a page that people read
small           the sizes of a rehearsal without a GPU
checks          part a: the tests that need CUDA; the published numbers
precisions      part b: the table of stages in float32, TF32 and bfloat16
made_up         features of a dataset's numbers, made up on the device
rehearsal       parts c and d: a run's stages for as long as there is time
watch           when an epoch of it began and ended, and how busy the device was
photographs     part e: preprocessing
toy             part f: TOY's whole run on CPU and CUDA
"""
