// Many tokens at once: some rows are expanded into a tile that stays in the second-level cache and multiplied there by a matrix product
// of our own. Lanes are tokens and a pair of weights is broadcast, so the tile is used as it was expanded; a general matrix product would
// rearrange every tile first. Included inside an anonymous namespace, after vbmi2.h.

constexpr int SIDE = 6;               // rows multiplied side by side: 6 x 4 vectors of sums, 4 of activations, 1 of weights
constexpr int64_t STRETCH = 1024;     // pairs of columns between two additions to the sums in memory; 256 KiB of activations
constexpr int64_t TILE_PADDING = 32;  // columns, so that the rows of a tile do not fall into one set of the first-level cache

// R rows of the tile times `pairs` pairs of columns of 16 V tokens, added to sums [R][BATCH]. Meanwhile as many lines
// are fetched from `next`: activations come from beyond the second-level cache once for every tile.
template <int R, int V>
INLINE void add_stretch(const uint16_t* tile, int64_t stride, const uint32_t* x, int64_t pairs, float* sums, bool fresh,
                        const uint32_t* next) {
  __m512 acc[R][V];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) acc[r][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; k++) {
    fetch(next + 16 * k);
    __m512bh tokens[V];
    UNROLL for (int v = 0; v < V; v++) tokens[v] = (__m512bh)_mm512_loadu_si512(x + 16 * (V * k + v));
    UNROLL for (int r = 0; r < R; r++) {
      int32_t pair;
      memcpy(&pair, tile + r * stride + 2 * k, 4);
      const __m512bh weights = (__m512bh)_mm512_set1_epi32(pair);
      UNROLL for (int v = 0; v < V; v++) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], tokens[v], weights);
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) {
      float* at = sums + BATCH * r + 16 * v;
      _mm512_storeu_ps(at, fresh ? acc[r][v] : _mm512_add_ps(_mm512_loadu_ps(at), acc[r][v]));
    }
}

template <int V>
void add_stretches(const uint16_t* tile, int64_t stride, const uint32_t* x, int64_t pairs, float* sums, int64_t rows, bool fresh) {
  const uint32_t* next = x + 16 * V * pairs;  // the stretch that is multiplied after this one; each group of rows fetches a part
  int64_t r = 0;
  for (; r + SIDE <= rows; r += SIDE, next += 16 * pairs)
    add_stretch<SIDE, V>(tile + r * stride, stride, x, pairs, sums + BATCH * r, fresh, next);
  for (; r < rows; r++) add_stretch<1, V>(tile + r * stride, stride, x, pairs, sums + BATCH * r, fresh, next);
}

// Up to 16 outputs of one token: sums lie BATCH apart.
INLINE void deliver_some(const float* sums, int64_t rows, const uint16_t* bias, uint16_t* y) {
  const __mmask16 some = (__mmask16)(rows >= 16 ? 0xffff : (1 << rows) - 1);
  const __m512i apart = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(BATCH));
  __m512 values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, apart, sums, 4);
  if (bias) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, bias));
    values = _mm512_add_ps(values, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
  }
  _mm256_mask_storeu_epi16(y, some, (__m256i)_mm512_cvtneps_pbh(values));
}

void many_tokens(const Batch& b, int64_t first, int64_t last, char* room) {
  const Matrix& m = *b.matrix;
  const int64_t rows = last - first, stride = 64 * m.words + TILE_PADDING, pairs = 32 * m.words;
  float* sums = (float*)room;
  uint16_t* tile = (uint16_t*)(sums + BATCH * rows);
  for (int64_t r = 0; r < rows; r++) {
    const uint16_t* values = (const uint16_t*)m.values + m.starts[first + r];
    const uint8_t* mask = m.bitmask + 8 * m.words * (first + r);
    for (int64_t w = 0; w < m.words; w++) {
      const uint64_t bits = load_word(mask + 8 * w);
      fetch((const char*)values + VALUES_AHEAD);
      fetch((const char*)values + VALUES_AHEAD + 64);
      Expand2::word(bits, values, tile + r * stride + 64 * w);
      values += __builtin_popcountll(bits);
    }
  }
  for (int64_t t = 0; t < b.tokens; t += BATCH) {
    const int64_t vectors = b.tokens - t >= BATCH ? BATCH / 16 : (b.tokens - t + 15) / 16;
    for (int64_t k = 0; k < pairs; k += STRETCH) {
      const uint32_t* x = b.x + t * pairs + 16 * vectors * k;
      const int64_t some = pairs - k < STRETCH ? pairs - k : STRETCH;
      (vectors == 1   ? add_stretches<1>
       : vectors == 2 ? add_stretches<2>
       : vectors == 3 ? add_stretches<3>
                      : add_stretches<4>)(tile + 2 * k, stride, x, some, sums, rows, k == 0);
    }
    for (int64_t i = t; i < b.tokens && i < t + BATCH; i++)
      for (int64_t r = 0; r < rows; r += 16)
        deliver_some(sums + BATCH * r + i - t, rows - r, b.bias ? b.bias + first + r : nullptr, b.y + i * m.out + first + r);
  }
}
