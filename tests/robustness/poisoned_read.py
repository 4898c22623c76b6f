"""Lets the extension read gates that AddressSanitizer was told to guard: it must end the process.

Without the sanitizer's runtime, or with an extension that is not instrumented, it ends in another
way, and a clean run of tests would mean nothing.
"""

import ctypes

import torch

from rasa_ext import rasa_linear

M, N, K, Rs, Rp = 8, 16, 32, 3, 4

x, weight = torch.randn(M, K), torch.randn(N, K)
A, A_shared = torch.randn(Rp, K), torch.randn(Rs, K)
Bt, Bt_shared = torch.randn(Rp, N), torch.randn(Rs, N)
d = torch.randn(Rs + Rp)
rasa_linear(x, weight, None, A, A_shared, Bt, Bt_shared, d)
guard = ctypes.CDLL(None).__asan_poison_memory_region
guard(ctypes.c_void_p(d.data_ptr()), ctypes.c_size_t(d.nbytes))
rasa_linear(x, weight, None, A, A_shared, Bt, Bt_shared, d)
print("the read was not seen")
