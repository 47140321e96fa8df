// The loops over rows and words, once for all instruction sets. Each file includes it inside its own anonymous namespace, after it has
// turned its instructions on, so that every instance belongs to that file.
//
// An instruction set describes one kind of value by a class K made from a word of the bitmask and its first value:
//   typename K::Value, K::Act   how values and activations are stored
//   typename K::Acc, K::Vec     a vector of partial sums, a vector of expanded weights
//   K::pieces, K::lanes         vectors a word of 64 columns gives, and activations each of them meets
//   K::sums                     vectors of sums that registers have room for, beside others
//   K::rows                     rows multiplied side by side, which share the loads of activations
//   k.piece(i)                  the i-th of them
//   K::zero(), K::multiply(acc, vec, x), K::add(a, b), K::scale(total, part, factor), K::total(acc)

// The hardware prefetchers do not keep up with this many streams, so each is fetched by hand, this many bytes ahead.
// Where a quarter or more is kept and there is one token, memory is the limit and not instructions: then as many rows are read side by
// side, and fetched into the second-level cache, as the first has no room for what lies ahead of them all.
constexpr int STREAMS = 4;
constexpr int VALUES_AHEAD = 4096, MASKS_AHEAD = 1024, DENSE_AHEAD = 2048;

INLINE void fetch(const void* at) { __builtin_prefetch((const void*)at, 0, 3); }
INLINE void fetch_shared(const void* at) { __builtin_prefetch((const void*)at, 0, 2); }  // not into the first-level cache

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
};

// R rows' weights of one word times the activations of its columns; `half` tells neighbouring words apart.
template <class K, int T, int R>
INLINE void add_word(Sums<K, T> (&sums)[R], const K (&words)[R], const typename K::Act* x, int64_t stride, int half) {
  UNROLL for (int i = 0; i < K::pieces; i++) {
    typename K::Vec weights[R];
    UNROLL for (int r = 0; r < R; r++) weights[r] = words[r].piece(i);
    UNROLL for (int t = 0; t < T; t++) {
      UNROLL for (int r = 0; r < R; r++) {
        typename K::Acc& part = sums[r].parts[t][(i + half * K::pieces) % chains(T)];
        part = K::multiply(part, weights[r], x + t * stride + i * K::lanes);
      }
    }
  }
}

// One word of the rows r...; each row's values move on to those of its next word.
template <class K, int T, int R, int... r>
INLINE void sparse_word(const Job& job, const uint8_t* const (&masks)[R], const typename K::Value* (&values)[R], int64_t w, int half,
                        Sums<K, T> (&sums)[R], std::integer_sequence<int, r...>) {
  const uint64_t bits[R] = {load_word(masks[r] + 8 * w)...};
  const K words[R] = {K(bits[r], values[r])...};
  add_word<K, T, R>(sums, words, (const typename K::Act*)job.x + 64 * w, job.stride, half);
  ((values[r] += __builtin_popcountll(bits[r])), ...);
}

template <class K, int T, int R>
INLINE void sparse_words(const Job& job, const uint8_t* const (&masks)[R], const typename K::Value* (&values)[R], int64_t from, int64_t to,
                         Sums<K, T> (&sums)[R]) {
  constexpr auto fetch_ahead = R == STREAMS ? fetch_shared : fetch;
  const std::make_integer_sequence<int, R> rows;
  int64_t w = from;
  for (; w + 2 <= to; w += 2) {
    UNROLL for (int r = 0; r < R; r++) {
      UNROLL for (size_t line = 0; line < sizeof(typename K::Value) + 1; line++)
        fetch_ahead((const char*)values[r] + (R == STREAMS ? VALUES_AHEAD / 2 : VALUES_AHEAD) + 64 * line);
      fetch_ahead(masks[r] + 8 * w + (R == STREAMS ? MASKS_AHEAD / 2 : MASKS_AHEAD));
    }
    sparse_word(job, masks, values, w, 0, sums, rows);
    sparse_word(job, masks, values, w + 1, 1, sums, rows);
  }
  if (w < to) sparse_word(job, masks, values, w, 0, sums, rows);
}

// R rows: `first` and those `apart` rows below each other.
template <class K, int T, int R>
INLINE void sparse_some(const Job& job, int64_t first, int64_t apart) {
  const Matrix& m = *job.matrix;
  const uint8_t* masks[R];
  const typename K::Value* values[R];
  Sums<K, T> sums[R];
  for (int r = 0; r < R; r++) {
    masks[r] = m.bitmask + 8 * m.words * (first + r * apart);
    values[r] = (const typename K::Value*)m.values + m.starts[first + r * apart];
    sums[r].clear();
  }
  sparse_words<K, T, R>(job, masks, values, 0, m.words, sums);
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) job.y[t * m.out + first + r * apart] = K::total(sums[r].sum(t));
}

// The rows are R runs side by side, so that each of the streams through memory goes straight on.
template <class K, int T, int R>
void side_by_side(const Job& job, int64_t first, int64_t last) {
  const int64_t apart = (last - first) / R;
  for (int64_t row = first; row < first + apart; row++) sparse_some<K, T, R>(job, row, apart);
  for (int64_t row = first + R * apart; row < last; row++) sparse_some<K, T, 1>(job, row, 0);
}

template <class K, int T>
void sparse_rows(const Job& job, int64_t first, int64_t last) {
  const Matrix& m = *job.matrix;
  if constexpr (K::rows == 2 && T == 1) {
    if (4 * m.starts[m.out] > m.in * m.out) return side_by_side<K, T, STREAMS>(job, first, last);
  }
  side_by_side<K, T, K::rows>(job, first, last);
}

template <class K, int T>
void scaled_rows(const Job& job, int64_t first, int64_t last) {
  const Matrix& m = *job.matrix;
  for (int64_t row = first; row < last; row++) {
    const uint8_t* masks[1] = {m.bitmask + 8 * m.words * row};
    const typename K::Value* values[1] = {(const typename K::Value*)m.values + m.starts[row]};
    typename K::Acc totals[T];
    for (int t = 0; t < T; t++) totals[t] = K::zero();
    for (int64_t group = 0; group < m.groups; group++) {
      const int64_t from = group * m.group_words, to = from + m.group_words < m.words ? from + m.group_words : m.words;
      Sums<K, T> sums[1];
      sums[0].clear();
      sparse_words<K, T, 1>(job, masks, values, from, to, sums);
      for (int t = 0; t < T; t++) totals[t] = K::scale(totals[t], sums[0].sum(t), m.scales[row * m.groups + group]);
    }
    for (int t = 0; t < T; t++) job.y[t * m.out + row] = K::total(totals[t]);
  }
}

// The same for a dense bfloat16 matrix; K holds where 64 values lie.
template <class K, int T, int R>
INLINE void dense_word(const uint16_t* (&weights)[R], const typename K::Act* x, int64_t stride, int half, Sums<K, T> (&sums)[R]) {
  K words[R];
  for (int r = 0; r < R; r++) {
    words[r].values = weights[r];
    weights[r] += 64;
  }
  add_word<K, T, R>(sums, words, x, stride, half);
}

// R rows: `first` and those `apart` rows below each other. Several streams side by side are read faster than one.
template <class K, int T, int R>
INLINE void dense_some(const Job& job, int64_t first, int64_t apart) {
  const Matrix& m = *job.matrix;
  const typename K::Act* x = (const typename K::Act*)job.x;
  const uint16_t* weights[R];
  Sums<K, T> sums[R];
  for (int r = 0; r < R; r++) {
    weights[r] = (const uint16_t*)m.values + m.in * (first + r * apart);
    sums[r].clear();
  }
  const int64_t whole = m.in / 64;
  int64_t w = 0;
  for (; w + 2 <= whole; w += 2) {
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int line = 0; line < 4; line++) fetch_shared((const char*)weights[r] + DENSE_AHEAD + 64 * line);
    dense_word<K, T, R>(weights, x + 64 * w, job.stride, 0, sums);
    dense_word<K, T, R>(weights, x + 64 * w + 64, job.stride, 1, sums);
  }
  if (w < whole) dense_word<K, T, R>(weights, x + 64 * w, job.stride, 0, sums);
  if (m.in % 64) {
    uint16_t rest[R][64] = {{0}};
    for (int r = 0; r < R; r++) {
      memcpy(rest[r], weights[r], 2 * (m.in % 64));
      weights[r] = rest[r];
    }
    dense_word<K, T, R>(weights, x + 64 * whole, job.stride, 1, sums);
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) job.y[t * m.out + first + r * apart] = K::total(sums[r].sum(t));
}

template <class K, int T>
void dense_rows(const Job& job, int64_t first, int64_t last) {
  constexpr int R = K::sums / (T * chains(T));
  const int64_t apart = (last - first) / R;
  for (int64_t row = first; row < first + apart; row++) dense_some<K, T, R>(job, row, apart);
  for (int64_t row = first + R * apart; row < last; row++) dense_some<K, T, 1>(job, row, 0);
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

// What a table of kernels begins with, by the classes Bf16, F16, F32, I8 and Dense, and Expand1, 2 and 4, of the file it stands in;
// `bf16_in_order` is a class whose pieces hold their columns in order.
#define FLOAT_KERNELS(name, bf16_layout, bf16_in_order)                                                                                     \
  name, runs,                                                                                                                               \
      {TOKENS_1_TO_8(sparse_rows, Bf16), TOKENS_1_TO_8(sparse_rows, F16), TOKENS_1_TO_8(sparse_rows, F32), TOKENS_1_TO_8(scaled_rows, I8)}, \
      {bf16_layout, PLAIN_F32, PLAIN_F32, PLAIN_F32}, {expand_rows<Expand1>, expand_rows<Expand2>, expand_rows<Expand4>},                   \
      TOKENS_1_TO_8(dense_rows, Dense),                                                                                                     \
      {sparse_gemm_rows<bf16_in_order>, sparse_gemm_rows<F16>, sparse_gemm_rows<F32>, sparse_gemm_rows<I8>},                                \
      CODE_KERNELS(WideFloats, WideInts)
