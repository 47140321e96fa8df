// AVX-512 with VBMI2, VBMI and BF16 (Zen 4 and later, Sapphire Rapids): expanded weights go straight into the dot-product instruction.
#if defined(__x86_64__)
#include <immintrin.h>

#include "billhook.h"
#include "target.h"
#include "words.h"

namespace {
// The two bytes of every int8 as bfloat16, each a table of 128 for the positive and one for the negative numbers; exact.
struct Int8AsBf16 {
  uint8_t low[2][128], high[2][128];
  Int8AsBf16() {
    for (int number = -128; number < 128; number++) {
      const uint16_t bits = to_bf16((float)number);
      low[number < 0][number & 127] = (uint8_t)bits;
      high[number < 0][number & 127] = (uint8_t)(bits >> 8);
    }
  }
};
const Int8AsBf16 AS_BF16;
}  // namespace

TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,avx2,fma,f16c,bmi,bmi2,popcnt")
namespace {
#include "closest.h"
#include "codes.h"
#include "rows.h"
// (after the loops: these are their instances)
#include "avx512_floats.h"
#include "vbmi2.h"

struct Dots : Floats {
  typedef uint16_t Act;
  typedef __m512i Vec;
  static constexpr int pieces = 2, lanes = 32;
  static INLINE Acc multiply(Acc acc, Vec w, const uint16_t* x) {
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
  }
};

struct Bf16Dot : Dots {
  typedef uint16_t Value;
  __m512i half[2];
  INLINE Bf16Dot(uint64_t bits, const uint16_t* values) : half{expand_words(bits, values, 0), expand_words(bits, values, 1)} {}
  INLINE Vec piece(int i) const { return half[i]; }
};

INLINE __m512i lookup(__m512i numbers, __mmask64 negative, const uint8_t (&table)[2][128]) {
  const __m512i plus = _mm512_permutex2var_epi8(_mm512_loadu_si512(table[0]), numbers, _mm512_loadu_si512(table[0] + 64));
  const __m512i minus = _mm512_permutex2var_epi8(_mm512_loadu_si512(table[1]), numbers, _mm512_loadu_si512(table[1] + 64));
  return _mm512_mask_blend_epi8(negative, plus, minus);
}

struct Int8s {  // 64 numbers as bfloat16: in each run of 16 the first eight of them, or the others
  __m512i low, high;
  INLINE Int8s(__m512i numbers) {
    const __mmask64 negative = _mm512_movepi8_mask(numbers);
    low = lookup(numbers, negative, AS_BF16.low);
    high = lookup(numbers, negative, AS_BF16.high);
  }
  INLINE __m512i eights(int second) const { return second ? _mm512_unpackhi_epi8(low, high) : _mm512_unpacklo_epi8(low, high); }
};

struct I8Dot : Dots {  // activations in SPLIT_BF16
  typedef int8_t Value;
  Int8s all;
  INLINE I8Dot(uint64_t bits, const int8_t* values) : all(expand_bytes(bits, values)) {}
  INLINE Vec piece(int i) const { return all.eights(i); }
};

struct Expand1As2 {  // int8 to bfloat16
  typedef int8_t Value;
  static INLINE void word(uint64_t bits, const Value* values, uint16_t* out) {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const Int8s all(_mm512_permutexvar_epi64(order, expand_bytes(bits, values)));
    _mm512_storeu_si512(out, all.eights(0));
    _mm512_storeu_si512(out + 32, all.eights(1));
  }
};

struct DenseDot : Dots {
  const uint16_t* values;
  INLINE Vec piece(int i) const { return _mm512_loadu_si512(values + 32 * i); }
};

#include "sparse_gemm.h"
#include "tiled_gemm.h"
}  // namespace
TARGET_END

static bool runs() {
  return kernels_vbmi2.runs() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
}

const Kernels kernels_bf16 = {
    FLOAT_KERNELS("avx512_bf16", SPLIT_F32, Bf16InOrder),
    {TOKENS_1_TO_8(sparse_rows, Bf16Dot), {}, {}, TOKENS_1_TO_8(scaled_rows, I8Dot)},
    {PLAIN_BF16, PLAIN_BF16, PLAIN_BF16, SPLIT_BF16},
    TOKENS_1_TO_8(dense_rows, DenseDot),
    arrange_tokens,
    tiled_gemm_rows,
};
#endif
