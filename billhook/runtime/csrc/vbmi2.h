// AVX-512 with VBMI2 (Ice Lake, Zen 4 and later): the processor expands 16-bit and 8-bit values itself. Included inside an anonymous
// namespace, by one file with and by one without the dot-product instruction.

// On Zen 5 (not on Zen 4) a zero-masking expand waits for what its destination held before; expanding into a register just zeroed does not.
// The zero and the loaded values come out of an assembly statement because a compiler that knew them would undo both: the form of the
// expand that reads memory is microcoded on AMD.
INLINE __m512i expand_words(uint64_t bits, const uint16_t* values, int half) {
  __m512i packed = _mm512_loadu_si512(half ? values + __builtin_popcount((uint32_t)bits) : values), zero;
  __asm__ volatile("vpxor %x0, %x0, %x0" : "=&x"(zero), "+v"(packed));
  return _mm512_mask_expand_epi16(zero, (__mmask32)(bits >> 32 * half), packed);
}

INLINE __m512i expand_bytes(uint64_t bits, const void* values) {
  __m512i packed = _mm512_loadu_si512(values), zero;
  __asm__ volatile("vpxor %x0, %x0, %x0" : "=&x"(zero), "+v"(packed));
  return _mm512_mask_expand_epi8(zero, (__mmask64)bits, packed);
}

struct Bf16 : Floats {  // activations in SPLIT_F32: a shift and a mask make floats of even and odd columns
  typedef uint16_t Value;
  __m512i half[2];
  INLINE Bf16(uint64_t bits, const uint16_t* values) : half{expand_words(bits, values, 0), expand_words(bits, values, 1)} {}
  INLINE Vec piece(int i) const {
    const __m512i both = half[i / 2];
    return _mm512_castsi512_ps(i % 2 ? _mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)) : _mm512_slli_epi32(both, 16));
  }
};

struct F16 : Floats {
  typedef uint16_t Value;
  __m512i half[2];
  INLINE F16(uint64_t bits, const uint16_t* values) : half{expand_words(bits, values, 0), expand_words(bits, values, 1)} {}
  INLINE Vec piece(int i) const {
    return _mm512_cvtph_ps(i % 2 ? _mm512_extracti64x4_epi64(half[i / 2], 1) : _mm512_castsi512_si256(half[i / 2]));
  }
};

struct I8 : Floats {
  typedef int8_t Value;
  __m512i all;
  INLINE I8(uint64_t bits, const int8_t* values) : all(expand_bytes(bits, values)) {}
  INLINE Vec piece(int i) const {
    const __m128i part = i == 0   ? _mm512_castsi512_si128(all)
                         : i == 1 ? _mm512_extracti32x4_epi32(all, 1)
                         : i == 2 ? _mm512_extracti32x4_epi32(all, 2)
                                  : _mm512_extracti32x4_epi32(all, 3);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(part));
  }
};

struct Expand1 {
  typedef uint8_t Value;
  static INLINE void word(uint64_t bits, const Value* values, Value* out) { _mm512_storeu_si512(out, expand_bytes(bits, values)); }
};
struct Expand2 {
  typedef uint16_t Value;
  static INLINE void word(uint64_t bits, const Value* values, Value* out) {
    _mm512_storeu_si512(out, expand_words(bits, values, 0));
    _mm512_storeu_si512(out + 32, expand_words(bits, values, 1));
  }
};
