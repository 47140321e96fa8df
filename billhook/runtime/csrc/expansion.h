// Tables for instruction sets that expand by shuffling bytes: for a byte of the bitmask, where each of its 8 columns' values lies.
#pragma once

#include <stdint.h>

enum { ABSENT = 0x80 };  // a shuffle index that gives zero

struct Expansion {
  uint8_t order[256][8];    // by column: the number of set bits before it, or ABSENT
  uint8_t pairs[256][16];   // the same for values of two bytes
  uint8_t quads[16][16];    // for 4 columns and values of four bytes

  constexpr Expansion() : order(), pairs(), quads() {
    for (int byte = 0; byte < 256; byte++) {
      int count = 0;
      for (int bit = 0; bit < 8; bit++) {
        const bool set = byte >> bit & 1;
        order[byte][bit] = (uint8_t)(set ? count : ABSENT);
        for (int k = 0; k < 2; k++) pairs[byte][2 * bit + k] = (uint8_t)(set ? 2 * count + k : ABSENT);
        for (int k = 0; k < 4; k++)
          if (byte < 16 && bit < 4) quads[byte][4 * bit + k] = (uint8_t)(set ? 4 * count + k : ABSENT);
        count += set;
      }
    }
  }
};

static constexpr Expansion EXPANSION;
