"""Prints quantise.json: the bytes that ggml's own `quantize_row_*_ref` make of 512 numbers, through the library inside
of the xllamacpp wheel, and NF4's values as bitsandbytes computes them (scipy's normal quantiles).

    python tests/golden/quantise.py > tests/golden/quantise.json

Made with xllamacpp 2026.10.11549 and scipy 1.17. The numbers come of a 64-bit generator that the test repeats.
"""

import ctypes
import glob
import json
import os

import scipy.stats
import xllamacpp

STATE = [0x1234]


def number():
    # splitmix64; sums of four uniforms, with one in sixteen ten times as large: an outlier for the block to cope with
    def uniform():
        STATE[0] = (STATE[0] + 0x9E3779B97F4A7C15) % 2**64
        z = STATE[0]
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        return (z >> 11) / 2**53

    value = sum(uniform() for _ in range(4)) - 2.0
    return value * (10.0 if uniform() < 1 / 16 else 1.0)


values = [number() for _ in range(512)]
library = ctypes.CDLL(glob.glob(os.path.join(os.path.dirname(xllamacpp.__file__), "*.so"))[0])
sizes = {"q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24), "q8_0": (32, 34), "q4_k": (256, 144),
         "q6_k": (256, 210)}
out = {}
for name, (block, size) in sizes.items():
    quantise = getattr(library, f"quantize_row_{name.replace('k', 'K')}_ref")
    quantise.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    source = (ctypes.c_float * 512)(*values)
    target = (ctypes.c_uint8 * (512 // block * size))()
    quantise(source, target, 512)
    out[name] = bytes(target).hex()

# bitsandbytes.functional.create_normal_map: eight positive and seven negative quantiles up to 0.9677083, and 0
offset = 0.9677083
def quantiles(n):
    return [float(scipy.stats.norm.ppf(offset + (0.5 - offset) * i / (n - 1))) for i in range(n - 1)]
nf4 = sorted(quantiles(9) + [0.0] + [-v for v in quantiles(8)])
out["nf4_values"] = [v / max(nf4) for v in nf4]
print(json.dumps(out, indent=1))
