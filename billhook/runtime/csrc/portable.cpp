// For any processor: plain loops over the set bits.
#include "billhook.h"
#include "target.h"

namespace {
#include "closest.h"
#include "codes.h"

struct Bf16 {
  typedef uint16_t Value;
  static float read(uint16_t value) { return from_bf16(value); }
};
struct F16 {
  typedef uint16_t Value;
  static float read(uint16_t value) { return from_f16(value); }
};
struct F32 {
  typedef float Value;
  static float read(float value) { return value; }
};
struct I8 {
  typedef int8_t Value;
  static float read(int8_t value) { return value; }
};

template <class V, int T>
void set_bits(const Job& job, int64_t first, int64_t last) {
  const Matrix& m = *job.matrix;
  const float* x = (const float*)job.x;
  for (int64_t row = first; row < last; row++) {
    const typename V::Value* values = (const typename V::Value*)m.values + m.starts[row];
    float totals[T] = {0};
    for (int64_t w = 0; w < m.words; w++) {
      float sums[T] = {0};  // of a word: one chain of additions through a whole row would round more
      for (uint64_t bits = load_word(m.bitmask + 8 * (m.words * row + w)); bits; bits &= bits - 1) {
        const float value = V::read(*values++);
        const int64_t column = 64 * w + __builtin_ctzll(bits);
        for (int t = 0; t < T; t++) sums[t] += value * x[t * job.stride + column];
      }
      const float scale = m.scales ? m.scales[row * m.groups + w / m.group_words] : 1;
      for (int t = 0; t < T; t++) totals[t] += scale * sums[t];
    }
    for (int t = 0; t < T; t++) job.y[t * m.out + row] = totals[t];
  }
}

template <class V, int T>
void dense_rows(const Job& job, int64_t first, int64_t last) {
  const Matrix& m = *job.matrix;
  for (int64_t row = first; row < last; row++) {
    const uint16_t* weights = (const uint16_t*)m.values + m.in * row;
    for (int t = 0; t < T; t++) {
      const float* x = (const float*)job.x + t * job.stride;
      float sums[8] = {0};
      int64_t j = 0;
      for (; j + 8 <= m.in; j += 8)
        for (int i = 0; i < 8; i++) sums[i] += from_bf16(weights[j + i]) * x[j + i];
      for (; j < m.in; j++) sums[j % 8] += from_bf16(weights[j]) * x[j];
      job.y[t * m.out + row] = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
    }
  }
}

template <class Value>
void expand(const Matrix& m, int64_t first, int64_t last, void* out) {
  Value* to = (Value*)out;
  for (int64_t row = first; row < last; row++, to += m.in) {
    const Value* values = (const Value*)m.values + m.starts[row];
    memset(to, 0, m.in * sizeof(Value));
    for (int64_t w = 0; w < m.words; w++)
      for (uint64_t bits = load_word(m.bitmask + 8 * (m.words * row + w)); bits; bits &= bits - 1)
        memcpy(to + 64 * w + __builtin_ctzll(bits), values++, sizeof(Value));
  }
}

bool always() { return true; }

}  // namespace

const Kernels kernels_portable = {
    "portable",
    always,
    {TOKENS_1_TO_8(set_bits, Bf16), TOKENS_1_TO_8(set_bits, F16), TOKENS_1_TO_8(set_bits, F32), TOKENS_1_TO_8(set_bits, I8)},
    {PLAIN_F32, PLAIN_F32, PLAIN_F32, PLAIN_F32},
    {expand<uint8_t>, expand<uint16_t>, expand<uint32_t>},
    TOKENS_1_TO_8(dense_rows, Bf16),
    {},
    CODE_KERNELS(Floats4, Ints4),
    {},
    {},
    {},
    nullptr,
    nullptr,
};
