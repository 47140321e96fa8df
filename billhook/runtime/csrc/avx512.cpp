// AVX-512 as of 2017 (F, BW, VL, DQ): sixteen columns at a time, widened to 32 bits and expanded.
#if defined(__x86_64__)
#include <immintrin.h>

#include "billhook.h"
#include "target.h"
#include "words.h"

TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2,popcnt")
namespace {
#include "closest.h"
#include "codes.h"
#include "rows.h"
// (after the loops: these are their instances)
#include "avx512_floats.h"

typedef Bf16InOrder Bf16;

struct F16 : Floats, Sixteens<uint16_t> {
  using Sixteens::Sixteens;
  INLINE Vec piece(int i) const { return _mm512_maskz_expand_ps(mask(i), _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at(i)))); }
};

struct I8 : Floats, Sixteens<int8_t> {
  using Sixteens::Sixteens;
  INLINE Vec piece(int i) const {
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at(i)));
    return _mm512_cvtepi32_ps(_mm512_maskz_expand_epi32(mask(i), wide));
  }
};

struct Expand1 {
  typedef uint8_t Value;
  static INLINE void word(uint64_t bits, const Value* values, Value* out) {
    const Sixteens<uint8_t> w(bits, values);
    UNROLL for (int i = 0; i < 4; i++) {
      const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)w.at(i)));
      _mm_storeu_si128((__m128i*)(out + 16 * i), _mm512_cvtepi32_epi8(_mm512_maskz_expand_epi32(w.mask(i), wide)));
    }
  }
};
struct Expand2 {
  typedef uint16_t Value;
  static INLINE void word(uint64_t bits, const Value* values, Value* out) {
    const Sixteens<uint16_t> w(bits, values);
    UNROLL for (int i = 0; i < 4; i++) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)w.at(i)));
      _mm256_storeu_si256((__m256i*)(out + 16 * i), _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(w.mask(i), wide)));
    }
  }
};

#include "sparse_gemm.h"
}  // namespace
TARGET_END

static bool runs() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
}

const Kernels kernels_avx512 = {FLOAT_KERNELS("avx512", PLAIN_F32, Bf16), {}, {}, {}, nullptr, nullptr};
#endif
