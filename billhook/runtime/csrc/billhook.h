// Packed weights and the kernels that multiply with them: what the files of this folder share.
//
// A weight [out, in] is a bitmask (per row `words` little-endian 64-bit words, bit j set where column j is kept, padding bits zero), the
// kept values in row-major order followed by 64 bytes that may be read, and `starts` [out + 1], where each row's values begin.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>

enum Type { TYPE_BF16 = 0, TYPE_F16 = 1, TYPE_F32 = 2, TYPE_I8 = 3 };

struct Matrix {
  const uint8_t* bitmask;
  const void* values;
  const int64_t* starts;
  const float* scales;  // int8 only: [out, groups]
  int64_t out, in, words, groups;
  int64_t group_words;  // words that share a scale
  int32_t type;         // of the values
};

// How a kernel wants its activations: every token padded with zeros to whole words of 64 columns.
enum Layout {
  PLAIN_F32 = 0,   // float
  SPLIT_F32 = 1,   // float, in each run of 32 columns the even ones first, then the odd ones
  PLAIN_BF16 = 2,  // bfloat16
  SPLIT_BF16 = 3   // bfloat16, in each run of 64 columns 0-7, 16-23, 32-39, 48-55, then the others
};

struct Job {
  const Matrix* matrix;
  const void* x;   // activations in the kernel's layout, `stride` columns apart
  int64_t stride;  // padded columns
  float* y;        // [tokens, out]
};

// The arguments of a product with many tokens: x, bias and y are all bfloat16 or all float, and rows of x lie x_stride apart.
struct Batch {
  const Matrix* matrix;
  const void* x;
  int64_t x_stride;
  const void* bias;  // or null
  void* y;           // [tokens, out]
  int64_t tokens;
};

enum { TOKENS = 8 };        // tokens a fused kernel takes at most
enum { BATCH = 64 };        // tokens that share a pass over a tile
enum { TILE_ROWS = 48 };    // rows a tile of expanded weights has at most
enum { SPARSE_ROWS = 64 };  // rows of the sparse product that share a pass over the activations, at most

typedef void (*RowsKernel)(const Job& job, int64_t first, int64_t last);
typedef void (*ArrangeKernel)(const Batch& batch, int64_t first, int64_t last, uint32_t* to);
typedef void (*TiledGemmKernel)(const Batch& batch, const uint32_t* arranged, int64_t first, int64_t last, char* room);
// Sums [last - first][tokens] of `tokens` (16, 32, 48 or 64) whose activations lie column by column from `x` on; `after` is read next.
typedef void (*SparseGemmKernel)(const Matrix& matrix, int64_t first, int64_t last, const float* x, int64_t tokens, const float* after,
                                 float* sums);
// The rows of a table closest to vectors [first, last), see closest.h.
typedef void (*ClosestKernel)(const float* x, int64_t stride, const float* table, int64_t points, int64_t first, int64_t last, int32_t* found);

// The codes that a weight can have, see codes.h.
struct Codes {
  const float* points;  // ascending, or null where they are all integers low ... high
  int64_t count;
  float low, high;
  int32_t mirrored;  // whether points stand for both signs
};

enum { MOST_COLUMNS = 256 };  // of a group, and of what is rounded or moved at once

// A weight in groups of columns, transposed: x [groups, group, rows], weight [groups, group]. Scales, offsets and each of what is found are
// [groups, rows]; what a kernel does not read may be null.
struct SumsJob {
  Codes codes;
  const float *x, *weight, *scale, *offset, *tried;
  float* found;
  int64_t groups, group, rows, tries;
  float most;
};
struct RoundJob {
  Codes codes;
  const float *x, *factor, *scale, *inverse, *offset;  // factor [columns, columns], row by row the coefficients of earlier errors
  const uint8_t* zero;                                 // bool [columns, rows], or null
  float *found, *errors;                               // [columns, rows]
  int64_t columns, group, rows;
};
struct MoveJob {
  Codes codes;
  const float *gram, *step, *scale, *inverse;  // gram [columns, columns]; step [columns]; scale and inverse [rows]
  const float* free;                           // [columns, rows], 0 where a code stays 0, or null
  const float* slope;                          // [columns, rows]
  float *found, *change;                       // [columns, rows], brought up to date
  int64_t columns, rows;
};
typedef void (*SumsKernel)(const SumsJob& job, int64_t first, int64_t last);
typedef void (*RoundKernel)(const RoundJob& job, int64_t first, int64_t last);
typedef void (*MoveKernel)(const MoveJob& job, int64_t first, int64_t last);

struct CodeKernels {
  ClosestKernel closest[2];  // for vectors of 4 and 8 numbers
  SumsKernel sums, search_scale, search_range;
  RoundKernel round;
  MoveKernel move;
};
typedef void (*ExpandKernel)(const Matrix& matrix, int64_t first, int64_t last, void* out);

struct Kernels {
  const char* name;
  bool (*runs)();              // whether this processor has the instructions
  RowsKernel rows[4][TOKENS];  // by type and tokens, activations in float
  Layout layout[4];
  ExpandKernel expand[3];           // by bytes of a value: 1, 2, 4 -> [0], [1], [2]
  RowsKernel dense[TOKENS];         // a dense bfloat16 matrix in `values`, activations in float
  SparseGemmKernel sparse_gemm[4];  // by type; null where there is none
  CodeKernels codes;
  // With bfloat16 activations and the dot-product instruction; null where there is none:
  RowsKernel dot[4][TOKENS];
  Layout dot_layout[4];
  RowsKernel dense_dot[TOKENS];
  ArrangeKernel arrange;       // of some sixteens of tokens, as `tiled_gemm` reads them
  TiledGemmKernel tiled_gemm;  // some rows of the product
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512, kernels_vbmi2, kernels_bf16, kernels_neon;

const Kernels* const PATHS[] = {
#if defined(__x86_64__)
    &kernels_bf16, &kernels_vbmi2, &kernels_avx512, &kernels_avx2,
#elif defined(__aarch64__)
    &kernels_neon,
#endif
    &kernels_portable,
};

static inline uint64_t load_word(const uint8_t* at) {
  uint64_t word;
  memcpy(&word, at, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  return word;
}

static inline float from_bf16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

static inline uint16_t to_bf16(float value) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline float from_f16(uint16_t bits) {
  const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 0x3ff;
  uint32_t wide;
  float value;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24, exact in float
    value = (float)fraction * 0x1p-24f;
    memcpy(&wide, &value, 4);
    wide |= sign;
  } else {
    wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  }
  memcpy(&value, &wide, 4);
  return value;
}

static inline uint16_t to_f16(float value) {  // round to nearest even
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00;
  if (bits >= 0x477ff000u) return sign | 0x7c00;  // rounds to infinity
  if (bits < 0x38800000u) {                       // subnormal or zero: let the addition round
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return sign | (uint16_t)(bits - 0x3f000000u);
  }
  return sign | (uint16_t)((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1)) >> 13);
}
