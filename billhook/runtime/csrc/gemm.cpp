// The product with many tokens at once: activations are arranged for the kernels, tiles of rows shared among threads.
#include "billhook.h"
#include "target.h"
#include "threads.h"

namespace {

// The scratch memory of a product: in float32 without the zeros, or in bfloat16 through expanded tiles.
struct Room {
  int64_t tile_rows, activation_bytes, tile_bytes;
};

int64_t sixteens(int64_t tokens) { return (tokens + 15) / 16; }

Room room_for(const Matrix& m, int64_t tokens, int type) {
  if (type == TYPE_F32) return {SPARSE_ROWS, sixteens(tokens) * 16 * 256 * m.words, 4 * BATCH * SPARSE_ROWS};
  const int64_t fitting = (400 << 10) / (128 * m.words) / 6 * 6;  // bytes of a tile; whole groups of SIDE rows
  const int64_t rows = fitting < 6 ? 6 : fitting < TILE_ROWS ? fitting : (int64_t)TILE_ROWS;
  return {rows, sixteens(tokens) * 16 * 128 * m.words, rows * (4 * BATCH + 128 * m.words + 64)};
}

// Tokens that are arranged with the sixteen number `s`: BATCH, or as many sixteens as are left.
int64_t tokens_beside(const Batch& b, int64_t s) {
  const int64_t left = 16 * sixteens(b.tokens) - 16 * s / BATCH * BATCH;
  return left < BATCH ? left : (int64_t)BATCH;
}

// Sixteens [first, last) of tokens in float32, column by column; a line of each token at a time. Padding columns are never read.
void arrange_floats(const Batch& b, int64_t first, int64_t last, float* to) {
  const int64_t in = b.matrix->in, columns = 64 * b.matrix->words;
  for (int64_t s = first; s < last; s++) {
    const int64_t width = tokens_beside(b, s), block = 16 * s / BATCH * BATCH;
    float* at = to + block * columns + (16 * s - block);
    for (int64_t j = 0; j < in; j += 16)
      for (int64_t t = 0; t < 16; t++) {
        const float* x = (const float*)b.x + (16 * s + t) * b.x_stride;
        for (int64_t i = j; i < in && i < j + 16; i++) at[i * width + t] = 16 * s + t < b.tokens ? x[i] : 0;
      }
  }
}

// Rows [first, last) of the sparse product in float32.
void multiply_sparse(SparseGemmKernel kernel, const Batch& b, const float* arranged, int64_t first, int64_t last, float* sums) {
  const int64_t out = b.matrix->out, columns = 64 * b.matrix->words;
  for (int64_t block = 0; block < b.tokens; block += BATCH) {
    const int64_t width = tokens_beside(b, block / 16);
    const float* x = arranged + block * columns;
    kernel(*b.matrix, first, last, x, width, block + width < b.tokens ? x + width * columns : arranged, sums);
    for (int64_t t = block; t < b.tokens && t < block + width; t++)
      for (int64_t r = first; r < last; r++)
        ((float*)b.y)[t * out + r] = sums[(r - first) * width + t - block] + (b.bias ? ((const float*)b.bias)[r] : 0);
  }
}

}  // namespace

// The scratch memory that billhook_gemm needs; 0 where there is no such kernel for these values and this type of activations.
PUBLIC int64_t billhook_gemm_bytes(const Matrix* m, int64_t tokens, int type, int path, int threads) {
  const Kernels& k = *PATHS[path];
  const bool tiled = type == TYPE_BF16 && k.tiled_gemm && (m->type == TYPE_BF16 || m->type == TYPE_I8);
  if (type == TYPE_F32 ? !k.sparse_gemm[m->type] : !tiled) return 0;
  const Room room = room_for(*m, tokens, type);
  return 64 + room.activation_bytes + threads * (64 + room.tile_bytes);
}

// x, y and bias are all float32, or all bfloat16.
PUBLIC void billhook_gemm(const Matrix* matrix, const void* x, int64_t x_stride, int64_t tokens, const void* bias, void* y,
                          char* room, int type, int path, int threads) {
  const Matrix& m = *matrix;
  const Kernels& k = *PATHS[path];
  const Batch batch = {matrix, x, x_stride, bias, y, tokens};
  const Room sizes = room_for(m, tokens, type);
  if (forked || m.out * m.in * tokens < 1 << 20) threads = 1;
  room += (64 - (uintptr_t)room % 64) % 64;
  char* arranged = room + 64 * threads;
  const auto arrange = [&](int64_t first, int64_t last) {
    type == TYPE_F32 ? arrange_floats(batch, first, last, (float*)arranged) : k.arrange(batch, first, last, (uint32_t*)arranged);
  };
  share(sixteens(tokens), tokens * m.in * 2, threads, arrange, 4);
  share_tiles(m.out, sizes.tile_rows, threads, (int64_t*)room, [&](int64_t slot, int64_t first, int64_t last) {
    char* tile = arranged + sizes.activation_bytes + slot * sizes.tile_bytes;
    type == TYPE_F32 ? multiply_sparse(k.sparse_gemm[m.type], batch, (const float*)arranged, first, last, (float*)tile)
                     : k.tiled_gemm(batch, (const uint32_t*)arranged, first, last, tile);
  });
}
