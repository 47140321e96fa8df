// What the AVX-512 files share: sums of 16 floats. Included inside their anonymous namespaces.

struct Floats {
  typedef float Act;
  typedef __m512 Acc;
  typedef __m512 Vec;
  static constexpr int pieces = 4, lanes = 16, rows = 2, sums = 16;
  static INLINE Acc zero() { return _mm512_setzero_ps(); }
  static INLINE Acc load(const float* at) { return _mm512_loadu_ps(at); }
  static INLINE void store(float* at, Acc acc) { _mm512_storeu_ps(at, acc); }
  static INLINE Acc add(Acc a, Acc b) { return _mm512_add_ps(a, b); }
  static INLINE Acc multiply(Acc acc, Vec w, const float* x) { return _mm512_fmadd_ps(w, _mm512_loadu_ps(x), acc); }
  static INLINE Acc scale(Acc total, Acc part, float factor) { return _mm512_fmadd_ps(part, _mm512_set1_ps(factor), total); }
  static INLINE float total(Acc acc) { return _mm512_reduce_add_ps(acc); }
};

// Expands 32-bit values from a register: the form of the instruction that reads memory is microcoded on AMD, and a compiler would choose it.
INLINE __m512i expand_quads(__mmask16 mask, const void* values) {
  __m512i packed = _mm512_loadu_si512(values);
  __asm__("" : "+v"(packed));
  return _mm512_maskz_expand_epi32(mask, packed);
}

struct F32 : Floats, Sixteens<float> {
  using Sixteens::Sixteens;
  INLINE Vec piece(int i) const { return _mm512_castsi512_ps(expand_quads(mask(i), at(i))); }
};

INLINE __m512 widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

struct Bf16InOrder : Floats, Sixteens<uint16_t> {
  using Sixteens::Sixteens;
  INLINE Vec piece(int i) const { return _mm512_maskz_expand_ps(mask(i), widen(_mm256_loadu_si256((const __m256i*)at(i)))); }
};

struct Dense : Floats {
  const uint16_t* values;
  INLINE Vec piece(int i) const { return widen(_mm256_loadu_si256((const __m256i*)(values + 16 * i))); }
};

struct Expand4 {
  typedef uint32_t Value;
  static INLINE void word(uint64_t bits, const Value* values, Value* out) {
    const Sixteens<uint32_t> w(bits, values);
    UNROLL for (int i = 0; i < 4; i++)
      _mm512_storeu_si512(out + 16 * i, expand_quads(w.mask(i), w.at(i)));
  }
};
