// Random packed matrices through every kernel this processor runs, compared with plain sums in double. Buffers are exactly as large as
// promised (values with 64 bytes behind them), so that a sanitizer sees every read and write beyond.
//
//     check_kernels CASES [SEED]      exits 1 and names the case when a result is wrong
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "billhook.h"

extern "C" {
int billhook_paths();
const char* billhook_path_name(int path);
int billhook_path_runs(int path);
int billhook_multiply(const Matrix*, const void*, int64_t, int64_t, const void*, void*, int, int, int);
void billhook_gemm(const Matrix*, const void*, int64_t, int64_t, const void*, void*, char*, int, int, int);
int64_t billhook_gemm_bytes(const Matrix*, int64_t, int, int, int);
void billhook_expand(const Matrix*, int64_t, int64_t, void*, int, int, int);
int64_t billhook_row_starts(const uint8_t*, int64_t, int64_t, int64_t*);
void billhook_bitmask(const void*, int, int64_t, int64_t, uint8_t*, int);
void billhook_gather(const void*, int, const Matrix*, void*, int);
uint64_t billhook_read(const char*, int64_t, int);
void billhook_closest(const float*, int64_t, int64_t, const float*, int64_t, int32_t*, int, int);
void billhook_code_sums(const SumsJob*, int, int);
void billhook_search_scale(const SumsJob*, int, int);
void billhook_search_range(const SumsJob*, int, int);
void billhook_round_columns(const RoundJob*, int, int);
void billhook_move_codes(const MoveJob*, int, int);
}

static uint64_t state;
static uint64_t random_bits() {
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}
static int64_t below(int64_t limit) { return (int64_t)(random_bits() % (uint64_t)limit); }
static double uniform() { return (double)(random_bits() >> 11) * 0x1p-53; }

// A buffer on the heap of just the bytes asked for, at an odd place when `shift` says so.
struct Bytes {
  std::vector<uint8_t> room;
  size_t shift;
  explicit Bytes(size_t bytes, size_t shift = 0) : room(bytes + shift), shift(shift) {}
  uint8_t* at() { return room.data() + shift; }
};

static size_t width_of(int type) { return type == TYPE_F32 ? 4 : type == TYPE_I8 ? 1 : 2; }

static void put(void* to, int64_t i, int type, double value) {
  const float single = (float)value;
  const uint16_t half = type == TYPE_BF16 ? to_bf16(single) : to_f16(single);
  const int8_t small = (int8_t)value;
  const size_t width = width_of(type);
  memcpy((uint8_t*)to + i * width, type == TYPE_F32 ? (const void*)&single : type == TYPE_I8 ? (const void*)&small : (const void*)&half, width);
}

static double get(const void* from, int64_t i, int type) {
  uint16_t half;
  float single;
  memcpy(&half, (const uint8_t*)from + i * width_of(type), width_of(type) == 2 ? 2 : 0);
  if (type == TYPE_I8) return ((const int8_t*)from)[i];
  if (type != TYPE_F32) return type == TYPE_BF16 ? from_bf16(half) : from_f16(half);
  memcpy(&single, (const uint8_t*)from + i * 4, 4);
  return single;
}

static void fail(const char* what, int path, int64_t out, int64_t in, int type) {
  printf("%s is wrong: kernels %s, %lld x %lld, type %d\n", what, billhook_path_name(path), (long long)out, (long long)in, type);
  exit(1);
}

struct Case {
  int64_t out, in, words, group;
  int type;
  std::vector<double> exact;  // [out, in], scales applied
};

static void multiply_all(const Case& c, const Matrix& m) {
  const int x_type = (int)below(3);
  const int64_t tokens = 1 + below(below(4) ? 10 : 150), stride = c.in + below(3);
  const size_t width = width_of(x_type);
  Bytes x(width * ((tokens - 1) * stride + c.in)), bias(width * c.out), y(width * tokens * c.out);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t j = 0; j < c.in; j++) put(x.at(), t * stride + j, x_type, 4 * uniform() - 2);
  for (int64_t r = 0; r < c.out; r++) put(bias.at(), r, x_type, uniform());
  const bool biased = below(2);
  const double rounding = x_type == TYPE_BF16 ? 0x1p-8 : x_type == TYPE_F16 ? 0x1p-10 : 0x1p-22;
  const auto check = [&](const char* what, int path, double weight_rounding = 0) {
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t r = 0; r < c.out; r++) {
        double sum = biased ? get(bias.at(), r, x_type) : 0, terms = 0;
        for (int64_t j = 0; j < c.in; j++) {
          const double term = c.exact[r * c.in + j] * get(x.at(), t * stride + j, x_type);
          sum += term;
          terms += fabs(term);
        }
        const double allowed = terms * (0x1p-20 + weight_rounding) + fabs(sum) * rounding + 0x1p-24;
        if (!(fabs(get(y.at(), t * c.out + r, x_type) - sum) <= allowed)) fail(what, path, c.out, c.in, c.type);
      }
  };
  for (int path = 0; path < billhook_paths(); path++) {
    if (!billhook_path_runs(path)) continue;
    const int threads = 1 + (int)below(2);
    if (billhook_multiply(&m, x.at(), stride, tokens, biased ? bias.at() : nullptr, y.at(), x_type, path, threads)) exit(2);
    check("a product", path);
    const int64_t needed = m.starts ? billhook_gemm_bytes(&m, tokens, x_type, path, threads) : 0;
    if (!needed) continue;
    Bytes room(needed, (size_t)below(64));
    memset(y.at(), 0xff, y.room.size());
    billhook_gemm(&m, x.at(), stride, tokens, biased ? bias.at() : nullptr, y.at(), (char*)room.at(), x_type, path, threads);
    check("a product with many tokens", path, x_type == TYPE_BF16 && m.groups > 1 ? 0x1p-8 : 0);
  }
}

static void one_case() {
  Case c;
  c.out = 1 + below(12);
  c.in = below(8) ? 1 + below(400) : 64 * (1 + below(6));
  c.words = (c.in + 63) / 64;
  c.type = (int)below(4);
  c.group = below(2) ? 0 : 64 << below(3);
  const size_t width = width_of(c.type);
  const double share = below(6) == 0 ? 0 : below(5) == 0 ? 1 : uniform();
  Bytes dense(width * c.out * c.in), mask(8 * c.words * c.out, (size_t)below(8));
  for (int64_t i = 0; i < c.out * c.in; i++)
    if (uniform() < share) put(dense.at(), i, c.type, c.type == TYPE_I8 ? (double)(below(256) - 128) : 4 * uniform() - 2);
  billhook_bitmask(dense.at(), (int)width, c.out, c.in, mask.at(), 1);
  std::vector<int64_t> starts(c.out + 1);
  if (billhook_row_starts(mask.at(), c.out, c.in, starts.data()) >= 0) fail("the padding", 0, c.out, c.in, c.type);
  Bytes values(width * starts[c.out] + 64);
  const int64_t groups = c.type == TYPE_I8 && c.group ? (c.in + c.group - 1) / c.group : 1;
  const int64_t group_words = groups == 1 ? c.words : c.group / 64;
  std::vector<float> scales(c.out * groups);
  for (float& scale : scales) scale = (float)(0.5 + uniform());
  const Matrix m = {mask.at(), values.at(), starts.data(), c.type == TYPE_I8 ? scales.data() : nullptr, c.out, c.in, c.words, groups,
                    group_words, c.type};
  billhook_gather(dense.at(), (int)width, &m, values.at(), 1);
  c.exact.resize(c.out * c.in);
  for (int64_t r = 0; r < c.out; r++)
    for (int64_t j = 0; j < c.in; j++)
      c.exact[r * c.in + j] = get(dense.at(), r * c.in + j, c.type) * (m.scales ? scales[r * groups + j / 64 / group_words] : 1);
  for (int path = 0; path < billhook_paths(); path++) {
    if (!billhook_path_runs(path)) continue;
    const int64_t first = below(c.out), last = first + 1 + below(c.out - first);
    Bytes back(width * (last - first) * c.in);
    billhook_expand(&m, first, last, back.at(), (int)width, path, 1);
    if (memcmp(back.at(), dense.at() + width * first * c.in, back.room.size())) fail("an expansion", path, c.out, c.in, c.type);
  }
  multiply_all(c, m);
  if (c.type == TYPE_BF16) multiply_all(c, {nullptr, dense.at(), nullptr, nullptr, c.out, c.in, c.words, 1, c.words, TYPE_BF16});
}

// Bytes that are no bitmask of ours: counted without reading beyond, and padding bits that are set are noticed.
static void garbage() {
  const int64_t out = 1 + below(9), in = 1 + below(300), words = (in + 63) / 64;
  Bytes mask(8 * words * out, (size_t)below(8));
  int64_t bits = 0;
  bool beyond = false;
  for (int64_t i = 0; i < 8 * words * out; i++) bits += __builtin_popcount(mask.at()[i] = below(3) ? 0 : (uint8_t)random_bits());
  for (int64_t r = 0; r < out; r++)
    for (int64_t j = in; j < 64 * words; j++) beyond |= mask.at()[8 * words * r + j / 8] >> j % 8 & 1;
  std::vector<int64_t> starts(out + 1);
  const int64_t wrong = billhook_row_starts(mask.at(), out, in, starts.data());
  if (beyond != (wrong >= 0) || starts[out] != bits) fail("a count", 0, out, in, 0);
}

// The rows of a table closest to vectors: a row that is found is as close as any, up to rounding.
static void closest_rows() {
  const int64_t dim = below(2) ? 4 : 8, vectors = below(70), points = 1 + below(40);
  Bytes x(4 * dim * vectors), table(4 * points * (dim + 1)), found(4 * vectors);
  for (int64_t i = 0; i < dim * vectors; i++) put(x.at(), i, TYPE_F32, 4 * uniform() - 2);
  for (int64_t i = 0; i < points * (dim + 1); i++) put(table.at(), i, TYPE_F32, 4 * uniform() - 2);
  const auto value = [&](int64_t vector, int64_t point) {
    double sum = get(table.at(), point * (dim + 1) + dim, TYPE_F32);
    for (int64_t d = 0; d < dim; d++) sum += get(table.at(), point * (dim + 1) + d, TYPE_F32) * get(x.at(), d * vectors + vector, TYPE_F32);
    return sum;
  };
  for (int path = 0; path < billhook_paths(); path++) {
    if (!billhook_path_runs(path)) continue;
    billhook_closest((const float*)x.at(), vectors, dim, (const float*)table.at(), points, (int32_t*)found.at(), path, 1);
    for (int64_t v = 0; v < vectors; v++)
      for (int64_t p = 0; p < points; p++)
        if (value(v, p) > value(v, ((const int32_t*)found.at())[v]) + 1e-4) fail("a closest row", path, vectors, points, TYPE_F32);
  }
}

static Bytes numbers(int64_t count, double low, double high) {
  Bytes found(4 * count);
  for (int64_t i = 0; i < count; i++) put(found.at(), i, TYPE_F32, low + (high - low) * uniform());
  return found;
}

// The loops of the quantizers: all instruction sets give the same bytes.
static void codes() {
  const int64_t rows = 1 + below(40), groups = 1 + below(3), group = 1 + below(20), columns = groups * group, tries = 1 + below(4);
  const float points[] = {-7, -3, 1, 2, 6};
  const Codes codes = {below(2) ? points : nullptr, 5, -7, 6, 0};
  Bytes x = numbers(columns * rows, -8, 8), weight = numbers(columns, .1, 1), scale = numbers(groups * rows, .2, 2), tried = numbers(2 * tries, .2, 1);
  Bytes factor = numbers(columns * columns, .5, 1), gram = numbers(columns * columns, 0, 1), free = numbers(columns * rows, 0, 1), zero(columns * rows);
  const auto at = [](Bytes& bytes) { return (float*)bytes.at(); };
  std::vector<uint8_t> wanted;
  for (int path = billhook_paths() - 1; path >= 0; path--) {
    if (!billhook_path_runs(path)) continue;
    Bytes sums(12 * groups * rows), best(12 * groups * rows), found(4 * columns * rows), errors(4 * columns * rows), moved(x), change(x);
    SumsJob job = {codes, at(x), at(weight), at(scale), at(scale), at(tried), at(sums), groups, group, rows, tries, 0};
    billhook_code_sums(&job, path, 1);
    job.found = at(best);
    billhook_search_scale(&job, path, 1);
    const RoundJob rounding = {codes, at(x), at(factor), at(scale), at(scale), nullptr, zero.at(), at(found), at(errors), columns, group, rows};
    billhook_round_columns(&rounding, path, 1);
    const MoveJob moving = {codes, at(gram), at(weight), at(scale), at(scale), at(free), at(x), at(moved), at(change), columns, rows};
    billhook_move_codes(&moving, path, 1);
    std::vector<uint8_t> all;
    const auto add = [&](const Bytes& bytes) { all.insert(all.end(), bytes.room.begin(), bytes.room.end()); };
    (add(sums), add(found), add(errors), add(moved), add(change));
    all.insert(all.end(), best.room.begin(), best.room.begin() + 8 * groups * rows);
    job.codes = {nullptr, 8, 0, 7, 0};
    billhook_search_range(&job, path, 1);
    add(best);
    if (wanted.empty()) wanted = all;
    if (wanted != all) fail("codes", path, columns, rows, TYPE_F32);
  }
}

int main(int count, char** arguments) {
  const int64_t cases = count > 1 ? atoll(arguments[1]) : 100;
  state = 88172645463325252u ^ (count > 2 ? (uint64_t)atoll(arguments[2]) << 20 : 0);
  for (int64_t i = 0; i < cases; i++) {
    one_case();
    garbage();
    closest_rows();
    codes();
  }
  Bytes some(1000);
  billhook_read((const char*)some.at(), 1000, 1);
  for (int path = 0; path < billhook_paths(); path++)
    if (billhook_path_runs(path)) printf("%s ", billhook_path_name(path));
  printf("agree in %lld cases\n", (long long)cases);
  return 0;
}
