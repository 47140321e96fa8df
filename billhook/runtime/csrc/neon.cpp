// NEON on 64-bit Arm: four columns a vector, expanded by a table lookup of bytes.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "billhook.h"
#include "expansion.h"
#include "target.h"
#include "words.h"

namespace {
#include "closest.h"
#include "codes.h"
#include "rows.h"

struct Floats {
  typedef float Act;
  typedef float32x4_t Acc;
  typedef float32x4_t Vec;
  static constexpr int pieces = 16, lanes = 4, rows = 1, sums = 16;
  static INLINE Acc zero() { return vdupq_n_f32(0); }
  static INLINE Acc load(const float* at) { return vld1q_f32(at); }
  static INLINE void store(float* at, Acc acc) { vst1q_f32(at, acc); }
  static INLINE Acc add(Acc a, Acc b) { return vaddq_f32(a, b); }
  static INLINE Acc multiply(Acc acc, Vec w, const float* x) { return vfmaq_f32(acc, w, vld1q_f32(x)); }
  static INLINE Acc scale(Acc total, Acc part, float factor) { return vfmaq_n_f32(total, part, factor); }
  static INLINE float total(Acc acc) { return vaddvq_f32(acc); }
};

INLINE uint8x16_t load16(const void* at) { return vld1q_u8((const uint8_t*)at); }

INLINE uint16x8_t pairs(uint8_t byte, const void* values) {
  return vreinterpretq_u16_u8(vqtbl1q_u8(load16(values), vld1q_u8(EXPANSION.pairs[byte])));
}

INLINE uint8x8_t bytes(uint8_t byte, const void* values) { return vqtbl1_u8(load16(values), vld1_u8(EXPANSION.order[byte])); }

INLINE uint32x4_t quads(uint8_t nibble, const void* values) {
  return vreinterpretq_u32_u8(vqtbl1q_u8(load16(values), vld1q_u8(EXPANSION.quads[nibble])));
}

INLINE float32x4_t widen(uint16x4_t bf16) { return vreinterpretq_f32_u32(vshll_n_u16(bf16, 16)); }

INLINE uint16x4_t half_of(uint16x8_t both, int i) { return i % 2 ? vget_high_u16(both) : vget_low_u16(both); }

struct Bf16 : Floats, Eights<uint16_t> {
  using Eights::Eights;
  INLINE Vec piece(int i) const { return widen(half_of(pairs(byte(i / 2), at(i / 2)), i)); }
};

struct F16 : Floats, Eights<uint16_t> {
  using Eights::Eights;
  INLINE Vec piece(int i) const { return vcvt_f32_f16(vreinterpret_f16_u16(half_of(pairs(byte(i / 2), at(i / 2)), i))); }
};

struct F32 : Floats, Eights<float> {
  using Eights::Eights;
  INLINE Vec piece(int i) const { return vreinterpretq_f32_u32(quads(nibble(i), at_nibble(i))); }
};

struct I8 : Floats, Eights<int8_t> {
  using Eights::Eights;
  INLINE Vec piece(int i) const {
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(bytes(byte(i / 2), at(i / 2))));
    return vcvtq_f32_s32(vmovl_s16(i % 2 ? vget_high_s16(wide) : vget_low_s16(wide)));
  }
};

struct Dense : Floats {
  const uint16_t* values;
  INLINE Vec piece(int i) const { return widen(vld1_u16(values + 4 * i)); }
};

struct Expand1 {
  typedef uint8_t Value;
  static INLINE void word(uint64_t bits, const Value* values, Value* out) {
    const Eights<Value> w(bits, values);
    UNROLL for (int i = 0; i < 8; i++) vst1_u8(out + 8 * i, bytes(w.byte(i), w.at(i)));
  }
};
struct Expand2 {
  typedef uint16_t Value;
  static INLINE void word(uint64_t bits, const Value* values, Value* out) {
    const Eights<Value> w(bits, values);
    UNROLL for (int i = 0; i < 8; i++) vst1q_u16(out + 8 * i, pairs(w.byte(i), w.at(i)));
  }
};
struct Expand4 {
  typedef uint32_t Value;
  static INLINE void word(uint64_t bits, const Value* values, Value* out) {
    const Eights<Value> w(bits, values);
    UNROLL for (int i = 0; i < 16; i++) vst1q_u32(out + 4 * i, quads(w.nibble(i), w.at_nibble(i)));
  }
};

#include "sparse_gemm.h"

bool runs() { return true; }

}  // namespace

const Kernels kernels_neon = {FLOAT_KERNELS("neon", PLAIN_F32, Bf16), {}, {}, {}, nullptr, nullptr};
#endif
