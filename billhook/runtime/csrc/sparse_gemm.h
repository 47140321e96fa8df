// Many tokens at once without the zeros: each kept weight is broadcast and meets the activations of its column, in float32. Where the dot
// product of bfloat16 is not to be had that is half as many multiplications as a dense product does at 50 % and a fifth at 80 %; nothing
// is expanded. Included inside an anonymous namespace, after the classes for values.
//
// Activations lie column by column, up to BATCH tokens of a column side by side. Those of the 64 columns of one word are 16 KiB: they stay
// in the first-level cache while all rows of a tile pass over them, so the loop is bound by its loads (five for four multiplications).

// The kept weights of a word in order, as floats times their scale; those that are floats stay where they are.
template <class K>
INLINE const float* in_order(const typename K::Value* values, int count, float scale, float* room) {
  if constexpr (sizeof(typename K::Value) == sizeof(float)) {
    return values;
  } else {
    const K all(count == 64 ? ~(uint64_t)0 : ((uint64_t)1 << count) - 1, values);
    UNROLL for (int i = 0; i < K::pieces; i++)
      if (K::lanes * i < count) K::store(room + K::lanes * i, K::scale(K::zero(), all.piece(i), scale));
    return room;
  }
}

// The `count` kept weights of a word times the activations of V vectors of tokens, added to `sums`. A word has sums of its own, because
// one chain of additions through a whole row would round more.
template <class K, int V>
INLINE void add_kept(uint64_t bits, int count, const float* values, const float* x, float* sums, bool fresh) {
  constexpr int S = V < 4 ? 4 / V : 1;  // chains, so that additions need not wait for each other
  typename K::Acc acc[S][V];
  UNROLL for (int s = 0; s < S; s++)
    UNROLL for (int v = 0; v < V; v++) acc[s][v] = K::zero();
  const auto add = [&](int s, float value) __attribute__((always_inline)) {
    const float* at = x + K::lanes * V * __builtin_ctzll(bits);
    bits &= bits - 1;
    UNROLL for (int v = 0; v < V; v++) acc[s][v] = K::scale(acc[s][v], K::load(at + K::lanes * v), value);
  };
  int k = 0;
  for (; k + S <= count; k += S)
    UNROLL for (int s = 0; s < S; s++) add(s, values[k + s]);
  for (; k < count; k++) add(0, values[k]);
  UNROLL for (int v = 0; v < V; v++) {
    typename K::Acc sum = acc[0][v];
    UNROLL for (int s = 1; s < S; s++) sum = K::add(sum, acc[s][v]);
    K::store(sums + K::lanes * v, fresh ? sum : K::add(K::load(sums + K::lanes * v), sum));
  }
}

// Rows [first, last) times V vectors of tokens: sums [rows][tokens].
template <class K, int V>
void sparse_gemm_block(const Matrix& m, int64_t first, int64_t last, const float* x, const float* after, float* sums) {
  constexpr int64_t word_floats = 64 * V * K::lanes, lines = word_floats / 16;
  const int64_t rows = last - first, share = (lines + rows - 1) / rows;
  const typename K::Value* values[SPARSE_ROWS];
  for (int64_t r = 0; r < rows; r++) values[r] = (const typename K::Value*)m.values + m.starts[first + r];
  for (int64_t w = 0; w < m.words; w++, x += word_floats) {
    const float* next = w + 1 < m.words ? x + word_floats : after;
    for (int64_t r = 0; r < rows; r++) {
      const uint64_t bits = load_word(m.bitmask + 8 * (m.words * (first + r) + w));
      const int count = __builtin_popcountll(bits);
      const float scale = m.scales ? m.scales[(first + r) * m.groups + w / m.group_words] : 1;
      // Each row fetches its values of the next word and a part of that word's activations.
      fetch((const char*)(values[r] + count) + 64);
      if (sizeof *values[r] == 4) fetch((const char*)(values[r] + count) + 128);
      for (int64_t line = r * share; line < (r + 1) * share && line < lines; line++) fetch_shared(next + 16 * line);
      alignas(64) float room[64];
      add_kept<K, V>(bits, count, in_order<K>(values[r], count, scale, room), x, sums + V * K::lanes * r, w == 0);
      values[r] += count;
    }
  }
}

template <class K>
void sparse_gemm_rows(const Matrix& m, int64_t first, int64_t last, const float* x, int64_t tokens, const float* after, float* sums) {
  constexpr int V = 16 / K::lanes;
  (tokens == 16   ? sparse_gemm_block<K, V>
   : tokens == 32 ? sparse_gemm_block<K, 2 * V>
   : tokens == 48 ? sparse_gemm_block<K, 3 * V>
                  : sparse_gemm_block<K, 4 * V>)(m, first, last, x, after, sums);
}
