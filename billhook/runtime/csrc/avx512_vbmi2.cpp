// AVX-512 with VBMI2, without the dot-product instruction for bfloat16 (Ice Lake).
#if defined(__x86_64__)
#include <immintrin.h>

#include "billhook.h"
#include "target.h"
#include "words.h"

TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx2,fma,f16c,bmi,bmi2,popcnt")
namespace {
#include "closest.h"
#include "codes.h"
#include "rows.h"
// (after the loops: these are their instances)
#include "avx512_floats.h"
#include "vbmi2.h"
#include "sparse_gemm.h"
}  // namespace
TARGET_END

static bool runs() { return kernels_avx512.runs() && __builtin_cpu_supports("avx512vbmi2"); }

const Kernels kernels_vbmi2 = {FLOAT_KERNELS("avx512_vbmi2", SPLIT_F32, Bf16InOrder), {}, {}, {}, nullptr, nullptr};
#endif
