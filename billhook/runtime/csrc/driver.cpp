// The surface of the library: which kernels this processor runs, activations in and out, rows shared among threads.
#include <stdlib.h>

#include "billhook.h"
#include "target.h"
#include "threads.h"

namespace {

int64_t width_of(int type) { return type == TYPE_F32 ? 4 : type == TYPE_I8 ? 1 : 2; }

float read(const void* from, int64_t i, int type) {
  if (type == TYPE_F32) return ((const float*)from)[i];
  const uint16_t bits = ((const uint16_t*)from)[i];
  return type == TYPE_BF16 ? from_bf16(bits) : from_f16(bits);
}

int64_t place(int64_t column, Layout layout) {
  const int64_t in = column % 64;
  if (layout == SPLIT_F32) return column - column % 32 + column % 2 * 16 + column % 32 / 2;
  if (layout == SPLIT_BF16) return column - in + in / 8 % 2 * 32 + in / 16 * 8 + in % 8;
  return column;
}

// One token's activations in the kernel's layout, padded with zeros to `stride` columns.
void arrange(const void* x, int type, int64_t in, int64_t stride, Layout layout, void* to) {
  if (layout == PLAIN_BF16) {
    memcpy(to, x, 2 * in);
    memset((uint16_t*)to + in, 0, 2 * (stride - in));
  } else if (layout == SPLIT_BF16) {
    for (int64_t j = 0; j < stride; j++) ((uint16_t*)to)[place(j, layout)] = j < in ? ((const uint16_t*)x)[j] : 0;
  } else if (layout == PLAIN_F32 && type == TYPE_BF16) {
    for (int64_t j = 0; j < in; j++) ((float*)to)[j] = from_bf16(((const uint16_t*)x)[j]);
    memset((float*)to + in, 0, 4 * (stride - in));
  } else {
    for (int64_t j = 0; j < stride; j++) ((float*)to)[place(j, layout)] = j < in ? read(x, j, type) : 0;
  }
}

void deliver(const float* sums, const void* bias, int type, void* y, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const float value = sums[i] + (bias ? read(bias, i, type) : 0);
    if (type == TYPE_F32)
      ((float*)y)[i] = value;
    else
      ((uint16_t*)y)[i] = type == TYPE_BF16 ? to_bf16(value) : to_f16(value);
  }
}

struct Call {
  const Matrix* matrix;
  RowsKernel kernel;
  Layout layout;
  const void *x, *bias;
  void* y;
  int type, threads;
  int64_t tokens, x_stride;
};

// Up to TOKENS tokens.
bool multiply_few(const Call& c) {
  const Matrix& m = *c.matrix;
  const int64_t stride = 64 * m.words, item = width_of(c.type);
  const bool ready = c.layout == PLAIN_BF16 && m.in == stride && (c.tokens == 1 || c.x_stride == stride);
  const size_t sums_bytes = (4 * c.tokens * m.out + 63) / 64 * 64, x_bytes = ready ? 0 : 4 * c.tokens * stride;
  void* scratch = nullptr;
  if (posix_memalign(&scratch, 64, sums_bytes + x_bytes + 64)) return false;
  char* arranged = (char*)scratch + sums_bytes;
  const int64_t token_bytes = stride * (c.layout == PLAIN_BF16 || c.layout == SPLIT_BF16 ? 2 : 4);
  for (int64_t t = 0; t < c.tokens && !ready; t++)
    arrange((const char*)c.x + t * c.x_stride * item, c.type, m.in, stride, c.layout, arranged + t * token_bytes);
  const Job job = {c.matrix, ready ? c.x : arranged, stride, (float*)scratch};
  const int64_t bytes = m.starts ? m.starts[m.out] * width_of(m.type) + 8 * m.words * m.out : 2 * m.in * m.out;
  share(m.out, bytes, c.threads, [&](int64_t first, int64_t last) {
    c.kernel(job, first, last);
    for (int64_t t = 0; t < c.tokens; t++)
      deliver(job.y + t * m.out, c.bias, c.type, (char*)c.y + t * m.out * item, first, last);
  });
  free(scratch);
  return true;
}

}  // namespace

PUBLIC int billhook_surface() { return 5; }  // as in library.py
PUBLIC int billhook_paths() { return sizeof PATHS / sizeof *PATHS; }
PUBLIC const char* billhook_path_name(int path) { return PATHS[path]->name; }
PUBLIC int billhook_path_runs(int path) { return PATHS[path]->runs(); }

// y [tokens, out] = x [tokens, in] times the weight, plus bias. x, y and bias are of one type (not int8); rows of x lie x_stride apart,
// those of y `out`. A matrix without `starts` is a dense bfloat16 one. Returns 0, or 1 when there is no memory.
PUBLIC int billhook_multiply(const Matrix* matrix, const void* x, int64_t x_stride, int64_t tokens, const void* bias, void* y, int type,
                             int path, int threads) {
  const Kernels& k = *PATHS[path];
  const bool dense = !matrix->starts;
  const bool dot = type == TYPE_BF16 && (dense ? k.dense_dot[0] : k.dot[matrix->type][0]);
  const Layout layout = dense ? (dot ? PLAIN_BF16 : PLAIN_F32) : dot ? k.dot_layout[matrix->type] : k.layout[matrix->type];
  const int64_t item = width_of(type);
  for (int64_t t = 0; t < tokens; t += TOKENS) {
    const int64_t few = tokens - t < TOKENS ? tokens - t : (int64_t)TOKENS;
    const RowsKernel* kernels = dense ? (dot ? k.dense_dot : k.dense) : dot ? k.dot[matrix->type] : k.rows[matrix->type];
    const Call call = {matrix, kernels[few - 1],  layout,   (const char*)x + t * x_stride * item, bias, (char*)y + t * matrix->out * item,
                       type,   threads,           few,      x_stride};
    if (!multiply_few(call)) return 1;
  }
  return 0;
}

// Rows [first, last) as they were before packing, values of `width` bytes.
PUBLIC void billhook_expand(const Matrix* matrix, int64_t first, int64_t last, void* out, int width, int path, int threads) {
  const ExpandKernel kernel = PATHS[path]->expand[width == 4 ? 2 : width - 1];
  share(last - first, (last - first) * matrix->in * width, threads, [&](int64_t from, int64_t to) {
    kernel(*matrix, first + from, first + to, (char*)out + from * matrix->in * width);
  }, 1);
}

// Fills starts [out + 1]; returns the first row that keeps a weight beyond column `in`, or -1.
PUBLIC int64_t billhook_row_starts(const uint8_t* bitmask, int64_t out, int64_t in, int64_t* starts) {
  const int64_t words = (in + 63) / 64;
  const uint64_t padding = in % 64 ? ~(uint64_t)0 << in % 64 : 0;
  int64_t wrong = -1, total = 0;
  for (int64_t row = 0; row < out; row++) {
    starts[row] = total;
    uint64_t word = 0;
    for (int64_t w = 0; w < words; w++) total += __builtin_popcountll(word = load_word(bitmask + 8 * (words * row + w)));
    if (word & padding && wrong < 0) wrong = row;
  }
  starts[out] = total;
  return wrong;
}

namespace {

template <class Value>
void make_bitmask(const Value* weight, int64_t in, uint8_t* mask) {
  for (int64_t j = 0; j < in; j++) mask[j / 8] |= (uint8_t)((weight[j] != 0) << j % 8);
}

template <class Value>
void gather(const Value* weight, const uint8_t* mask, int64_t words, Value* values) {
  for (int64_t w = 0; w < words; w++)
    for (uint64_t bits = load_word(mask + 8 * w); bits; bits &= bits - 1) *values++ = weight[64 * w + __builtin_ctzll(bits)];
}

}  // namespace

// The bitmask, zeroed by the caller, of the weights whose bytes are not all zero.
PUBLIC void billhook_bitmask(const void* weight, int width, int64_t out, int64_t in, uint8_t* bitmask, int threads) {
  const int64_t words = (in + 63) / 64;
  share(out, out * in * width, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const char* at = (const char*)weight + row * in * width;
      uint8_t* mask = bitmask + 8 * words * row;
      width == 4 ? make_bitmask((const uint32_t*)at, in, mask)
                 : width == 2 ? make_bitmask((const uint16_t*)at, in, mask) : make_bitmask((const uint8_t*)at, in, mask);
    }
  });
}

// The kept values in order.
PUBLIC void billhook_gather(const void* weight, int width, const Matrix* matrix, void* values, int threads) {
  const Matrix& m = *matrix;
  share(m.out, m.out * m.in * width, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const char* at = (const char*)weight + row * m.in * width;
      const uint8_t* mask = m.bitmask + 8 * m.words * row;
      char* to = (char*)values + m.starts[row] * width;
      width == 4 ? gather((const uint32_t*)at, mask, m.words, (uint32_t*)to)
                 : width == 2 ? gather((const uint16_t*)at, mask, m.words, (uint16_t*)to)
                              : gather((const uint8_t*)at, mask, m.words, (uint8_t*)to);
    }
  });
}

// Reads `bytes` and returns their sum, to measure how fast memory can be read. Each thread reads four runs side by side: one run is slower.
PUBLIC uint64_t billhook_read(const char* from, int64_t bytes, int threads) {
  uint64_t total = 0;
  share(bytes / 256, bytes, threads, [&](int64_t first, int64_t last) {
    const int64_t run = 64 * (last - first);
    uint64_t sums[4] = {0, 0, 0, 0};
    for (int64_t at = 0; at < run; at += 64)
      for (int k = 0; k < 4; k++) {
        const char* line = from + 256 * first + k * run + at;
        __builtin_prefetch(line + 4096, 0, 2);
        for (int i = 0; i < 64; i += 8) sums[k] += load_word((const uint8_t*)line + i);
      }
    __atomic_fetch_add(&total, sums[0] + sums[1] + sums[2] + sums[3], __ATOMIC_RELAXED);
  });
  return total;
}
