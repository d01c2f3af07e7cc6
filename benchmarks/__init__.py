"""Speed, measured: `python -m benchmarks.attention` and `.decode` against full attention, `.tune` for tile sizes.

attention.py   the passes of nsa_attention beside full attention, at several lengths: JSON, figure, table
tune.py        the fastest tiles of each kernel, into pallas_kernels/tiles.json
decode.py      one step of decoding beside full attention on its KV cache; tiles of its kernels
steps.py       what that measures: an attention step, a step of a whole model
problems.py    inputs at the size of real models, and how alike the choices of neighbouring queries are
checks.py      what must hold before anything is timed
timing.py      ahead-of-time compilation, and the rule of measurement
kernels.py     each kernel of pallas_kernels alone, with inputs as it has them in a training step
baselines.py   full attention: cuDNN, and the kernel that ships with JAX
peer.py        a PyTorch NSA, where it is installed
command.py     what their command lines share
record.py      where and how a measurement was made; files
figure.py      time and ratio over length
"""
