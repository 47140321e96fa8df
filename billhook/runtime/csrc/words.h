// A word of the bitmask and its values, seen some columns at a time. These are for any processor: constructors that classes inherit
// are compiled as those are, whatever instructions are turned on around them.
#pragma once

#include <stdint.h>

#include "target.h"

// `at(i)` is the first value of the i-th sixteen columns.
template <class V>
struct Sixteens {
  typedef V Value;
  uint64_t bits;
  const V* values;
  INLINE Sixteens(uint64_t bits, const V* values) : bits(bits), values(values) {}
  INLINE uint16_t mask(int i) const { return (uint16_t)(bits >> 16 * i); }
  INLINE const V* at(int i) const { return i ? values + __builtin_popcountll(bits << (64 - 16 * i) % 64) : values; }
};

// Byte i of the result: set bits in bytes 0 to i - 1 of `bits`.
static inline uint64_t bits_before(uint64_t bits) {
  bits -= bits >> 1 & 0x5555555555555555u;
  bits = (bits & 0x3333333333333333u) + (bits >> 2 & 0x3333333333333333u);
  bits = (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return (bits * 0x0101010101010101u) << 8;
}

// `at(i)` is the first value of the i-th eight columns, `at_nibble(i)` of the i-th four.
template <class V>
struct Eights {
  typedef V Value;
  uint64_t bits, before;
  const V* values;
  INLINE Eights(uint64_t bits, const V* values) : bits(bits), before(bits_before(bits)), values(values) {}
  INLINE uint8_t byte(int i) const { return (uint8_t)(bits >> 8 * i); }
  INLINE const V* at(int i) const { return values + (before >> 8 * i & 0xff); }
  INLINE uint8_t nibble(int i) const { return bits >> 4 * i & 15; }
  INLINE const V* at_nibble(int i) const { return at(i / 2) + (i % 2 ? __builtin_popcount(byte(i / 2) & 15) : 0); }
};
