// The loops over rows and words, once for all instruction sets. Each file includes it inside its own anonymous namespace, after it has
// turned its instructions on, so that every instance belongs to that file.
//
// An instruction set describes one kind of value by a class K made from a word of the bitmask and its first value:
//   typename K::Value, K::Act   how values and activations are stored
//   typename K::Acc, K::Vec     a vector of partial sums, a vector of expanded weights
//   K::pieces, K::lanes         vectors a word of 64 columns gives, and activations each of them meets
//   k.piece(i)                  the i-th of them
//   K::zero(), K::multiply(acc, vec, x), K::add(a, b), K::scale(total, part, factor), K::total(acc)

// The hardware prefetchers do not keep up with two streams, so each is fetched by hand, this many bytes ahead.
constexpr int VALUES_AHEAD = 4096, MASKS_AHEAD = 2048, DENSE_AHEAD = 4096;

INLINE void fetch(const void* at) { __builtin_prefetch((const void*)at, 0, 3); }

// Accumulators a token has, so that additions need not wait for each other.
constexpr int chains(int tokens) { return tokens <= 2 ? 4 : tokens <= 4 ? 2 : 1; }

template <class K, int T>
struct Sums {
  static constexpr int S = chains(T);
  typename K::Acc parts[T][S];

  INLINE void clear() {
    for (int t = 0; t < T; t++)
      for (int i = 0; i < S; i++) parts[t][i] = K::zero();
  }
  INLINE typename K::Acc sum(int t) const {
    if (S == 4) return K::add(K::add(parts[t][0], parts[t][1 % S]), K::add(parts[t][2 % S], parts[t][3 % S]));
    if (S == 2) return K::add(parts[t][0], parts[t][1 % S]);
    return parts[t][0];
  }
  // One word's weights times the activations of its columns; `half` tells neighbouring words apart.
  INLINE void add(const K& k, const typename K::Act* x, int64_t stride, int half) {
    UNROLL for (int i = 0; i < K::pieces; i++) {
      const typename K::Vec weights = k.piece(i);
      UNROLL for (int t = 0; t < T; t++) {
        typename K::Acc& part = parts[t][(i + half * K::pieces) % S];
        part = K::multiply(part, weights, x + t * stride + i * K::lanes);
      }
    }
  }
};

// Words [from, to) of a row; returns where the values of the next word begin.
template <class K, int T>
INLINE const typename K::Value* sparse_words(const Job& job, const uint8_t* mask, const typename K::Value* values, int64_t from, int64_t to,
                                             Sums<K, T>& sums) {
  const typename K::Act* x = (const typename K::Act*)job.x;
  int64_t w = from;
  for (; w + 2 <= to; w += 2) {
    const uint64_t low = load_word(mask + 8 * w), high = load_word(mask + 8 * w + 8);
    const typename K::Value* middle = values + __builtin_popcountll(low);
    UNROLL for (size_t line = 0; line < sizeof(typename K::Value); line++) fetch((const char*)values + VALUES_AHEAD + 64 * line);
    fetch(mask + 8 * w + MASKS_AHEAD);
    sums.add(K(low, values), x + 64 * w, job.stride, 0);
    sums.add(K(high, middle), x + 64 * w + 64, job.stride, 1);
    values = middle + __builtin_popcountll(high);
  }
  if (w < to) {
    const uint64_t bits = load_word(mask + 8 * w);
    sums.add(K(bits, values), x + 64 * w, job.stride, 0);
    values += __builtin_popcountll(bits);
  }
  return values;
}

template <class K, int T>
void sparse_rows(const Job& job, int64_t first, int64_t last) {
  const Matrix& m = *job.matrix;
  for (int64_t row = first; row < last; row++) {
    Sums<K, T> sums;
    sums.clear();
    sparse_words<K, T>(job, m.bitmask + 8 * m.words * row, (const typename K::Value*)m.values + m.starts[row], 0, m.words, sums);
    for (int t = 0; t < T; t++) job.y[t * m.out + row] = K::total(sums.sum(t));
  }
}

template <class K, int T>
void scaled_rows(const Job& job, int64_t first, int64_t last) {
  const Matrix& m = *job.matrix;
  for (int64_t row = first; row < last; row++) {
    const uint8_t* mask = m.bitmask + 8 * m.words * row;
    const typename K::Value* values = (const typename K::Value*)m.values + m.starts[row];
    typename K::Acc totals[T];
    for (int t = 0; t < T; t++) totals[t] = K::zero();
    for (int64_t group = 0; group < m.groups; group++) {
      const int64_t from = group * m.group_words, to = from + m.group_words < m.words ? from + m.group_words : m.words;
      Sums<K, T> sums;
      sums.clear();
      values = sparse_words<K, T>(job, mask, values, from, to, sums);
      for (int t = 0; t < T; t++) totals[t] = K::scale(totals[t], sums.sum(t), m.scales[row * m.groups + group]);
    }
    for (int t = 0; t < T; t++) job.y[t * m.out + row] = K::total(totals[t]);
  }
}

// The same for a dense bfloat16 matrix; K is made from 64 values that lie in memory.
template <class K, int T>
void dense_rows(const Job& job, int64_t first, int64_t last) {
  const Matrix& m = *job.matrix;
  const typename K::Act* x = (const typename K::Act*)job.x;
  const int64_t whole = m.in / 64;
  for (int64_t row = first; row < last; row++) {
    const uint16_t* weights = (const uint16_t*)m.values + m.in * row;
    Sums<K, T> sums;
    sums.clear();
    int64_t w = 0;
    for (; w + 2 <= whole; w += 2) {
      UNROLL for (int line = 0; line < 4; line++) fetch((const char*)(weights + 64 * w) + DENSE_AHEAD + 64 * line);
      sums.add(K(weights + 64 * w), x + 64 * w, job.stride, 0);
      sums.add(K(weights + 64 * w + 64), x + 64 * w + 64, job.stride, 1);
    }
    if (w < whole) sums.add(K(weights + 64 * w), x + 64 * w, job.stride, 0);
    if (m.in % 64) {
      uint16_t rest[64] = {0};
      memcpy(rest, weights + 64 * whole, 2 * (m.in % 64));
      sums.add(K(rest), x + 64 * whole, job.stride, 1);
    }
    for (int t = 0; t < T; t++) job.y[t * m.out + row] = K::total(sums.sum(t));
  }
}

// E::word(bits, values, out) writes the 64 columns of a word.
template <class E>
void expand_rows(const Matrix& m, int64_t first, int64_t last, void* out) {
  typedef typename E::Value Value;
  Value* to = (Value*)out;
  const int64_t whole = m.in / 64, rest = m.in % 64;
  for (int64_t row = first; row < last; row++, to += m.in) {
    const uint8_t* mask = m.bitmask + 8 * m.words * row;
    const Value* values = (const Value*)m.values + m.starts[row];
    for (int64_t w = 0; w < whole; w++) {
      const uint64_t bits = load_word(mask + 8 * w);
      UNROLL for (size_t line = 0; line < sizeof(Value); line++) fetch((const char*)values + VALUES_AHEAD + 64 * line);
      E::word(bits, values, to + 64 * w);
      values += __builtin_popcountll(bits);
    }
    if (rest) {
      Value last_word[64];
      E::word(load_word(mask + 8 * whole), values, last_word);
      memcpy(to + 64 * whole, last_word, rest * sizeof(Value));
    }
  }
}

#define TOKENS_1_TO_8(function, K) \
  { function<K, 1>, function<K, 2>, function<K, 3>, function<K, 4>, function<K, 5>, function<K, 6>, function<K, 7>, function<K, 8> }
