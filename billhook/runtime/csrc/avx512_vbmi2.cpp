// AVX-512 with VBMI2, without the dot-product instruction for bfloat16 (Ice Lake).
#if defined(__x86_64__)
#include <immintrin.h>

#include "billhook.h"
#include "target.h"

TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx2,fma,f16c,bmi,bmi2,popcnt")
namespace {
#include "rows.h"
// (after the loops: these are their instances)
#include "avx512_floats.h"
#include "vbmi2.h"
}  // namespace
TARGET_END

static bool runs() { return kernels_avx512.runs() && __builtin_cpu_supports("avx512vbmi2"); }

const Kernels kernels_vbmi2 = {
    "avx512_vbmi2",
    runs,
    {TOKENS_1_TO_8(sparse_rows, Bf16), TOKENS_1_TO_8(sparse_rows, F16), TOKENS_1_TO_8(sparse_rows, F32), TOKENS_1_TO_8(scaled_rows, I8)},
    {SPLIT_F32, PLAIN_F32, PLAIN_F32, PLAIN_F32},
    {},
    {},
    {expand_rows<Expand1>, expand_rows<Expand2>, expand_rows<Expand4>},
    TOKENS_1_TO_8(dense_rows, Dense),
    {},
    nullptr,
};
#endif
