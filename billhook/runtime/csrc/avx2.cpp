// AVX2 with FMA and F16C: eight columns at a time, expanded by a shuffle of bytes that a table gives.
#if defined(__x86_64__)
#include <immintrin.h>

#include "billhook.h"
#include "expansion.h"
#include "target.h"
#include "words.h"

TARGET_BEGIN("avx2,fma,f16c,bmi,bmi2,popcnt")
namespace {
#include "closest.h"
#include "codes.h"
#include "rows.h"

struct Floats {
  typedef float Act;
  typedef __m256 Acc;
  typedef __m256 Vec;
  static constexpr int pieces = 8, lanes = 8, rows = 1, sums = 8;
  static INLINE Acc zero() { return _mm256_setzero_ps(); }
  static INLINE Acc load(const float* at) { return _mm256_loadu_ps(at); }
  static INLINE void store(float* at, Acc acc) { _mm256_storeu_ps(at, acc); }
  static INLINE Acc add(Acc a, Acc b) { return _mm256_add_ps(a, b); }
  static INLINE Acc multiply(Acc acc, Vec w, const float* x) { return _mm256_fmadd_ps(w, _mm256_loadu_ps(x), acc); }
  static INLINE Acc scale(Acc total, Acc part, float factor) { return _mm256_fmadd_ps(part, _mm256_set1_ps(factor), total); }
  static INLINE float total(Acc acc) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps(acc, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
};

INLINE __m128i pairs(uint8_t byte, const void* values) {
  return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)values), _mm_loadu_si128((const __m128i*)EXPANSION.pairs[byte]));
}

INLINE __m128i bytes(uint8_t byte, const void* values) {
  return _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i*)values), _mm_loadl_epi64((const __m128i*)EXPANSION.order[byte]));
}

INLINE __m256i quads(uint8_t byte, const void* values) {
  const __m256i order = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)EXPANSION.order[byte]));
  const __m256i there = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)values), order);
  return _mm256_andnot_si256(_mm256_srai_epi32(order, 31), there);
}

INLINE __m256 widen(__m128i bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16)); }

struct Bf16 : Floats, Eights<uint16_t> {
  using Eights::Eights;
  INLINE Vec piece(int i) const { return widen(pairs(byte(i), at(i))); }
};

struct F16 : Floats, Eights<uint16_t> {
  using Eights::Eights;
  INLINE Vec piece(int i) const { return _mm256_cvtph_ps(pairs(byte(i), at(i))); }
};

struct F32 : Floats, Eights<float> {
  using Eights::Eights;
  INLINE Vec piece(int i) const { return _mm256_castsi256_ps(quads(byte(i), at(i))); }
};

struct I8 : Floats, Eights<int8_t> {
  using Eights::Eights;
  INLINE Vec piece(int i) const { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes(byte(i), at(i)))); }
};

struct Dense : Floats {
  const uint16_t* values;
  INLINE Vec piece(int i) const { return widen(_mm_loadu_si128((const __m128i*)(values + 8 * i))); }
};

struct Expand1 {
  typedef uint8_t Value;
  static INLINE void word(uint64_t bits, const Value* values, Value* out) {
    const Eights<Value> w(bits, values);
    UNROLL for (int i = 0; i < 8; i++) _mm_storel_epi64((__m128i*)(out + 8 * i), bytes(w.byte(i), w.at(i)));
  }
};
struct Expand2 {
  typedef uint16_t Value;
  static INLINE void word(uint64_t bits, const Value* values, Value* out) {
    const Eights<Value> w(bits, values);
    UNROLL for (int i = 0; i < 8; i++) _mm_storeu_si128((__m128i*)(out + 8 * i), pairs(w.byte(i), w.at(i)));
  }
};
struct Expand4 {
  typedef uint32_t Value;
  static INLINE void word(uint64_t bits, const Value* values, Value* out) {
    const Eights<Value> w(bits, values);
    UNROLL for (int i = 0; i < 8; i++) _mm256_storeu_si256((__m256i*)(out + 8 * i), quads(w.byte(i), w.at(i)));
  }
};

#include "sparse_gemm.h"
}  // namespace
TARGET_END

static bool runs() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("popcnt");
}

const Kernels kernels_avx2 = {FLOAT_KERNELS("avx2", PLAIN_F32, Bf16), {}, {}, {}, nullptr, nullptr};
#endif
