// Many tokens at once: some rows are expanded into a tile that stays in the second-level cache and multiplied there by a matrix product
// of our own. Lanes are tokens and a pair of weights is broadcast, so the tile is used as it was expanded; a general matrix product would
// rearrange every tile first. int8 values become bfloat16 on the tile, which is exact. A scale that a whole row shares meets the sums;
// those of groups of columns are multiplied into the tile, which rounds its weights to bfloat16, as they are in a dense model: applied to
// partial sums they would cost 8 % of the time with groups of 64. Included inside an anonymous namespace, after the classes that expand.
//
// Activations are arranged in blocks of BATCH tokens, the last one of as many sixteens as it needs; in a block each pair of columns has its
// tokens side by side. Tokens and columns beyond the last are zero.

constexpr int SIDE = 6;               // rows multiplied side by side: 6 x 4 vectors of sums, 4 of activations, 1 of weights
constexpr int64_t STRETCH = 1024;     // pairs of columns between two additions to the sums in memory; 256 KiB of activations
constexpr int64_t TILE_PADDING = 32;  // columns, so that the rows of a tile do not fall into one set of the first-level cache

// A square of four-byte numbers, rows become columns.
INLINE void turn(__m512i (&v)[16]) {
  __m512i w[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4)
    UNROLL for (int j = 0; j < 2; j++) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(w[i + j], w[i + 2 + j]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(w[i + j], w[i + 2 + j]);
    }
  UNROLL for (int i = 0; i < 16; i += 8)
    UNROLL for (int j = 0; j < 4; j++) {
      w[i + j] = _mm512_shuffle_i32x4(v[i + j], v[i + 4 + j], 0x88);
      w[i + 4 + j] = _mm512_shuffle_i32x4(v[i + j], v[i + 4 + j], 0xdd);
    }
  UNROLL for (int j = 0; j < 8; j++) {
    v[j] = _mm512_shuffle_i32x4(w[j], w[8 + j], 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(w[j], w[8 + j], 0xdd);
  }
}

// Sixteens [first, last) of a batch's tokens.
void arrange_tokens(const Batch& b, int64_t first, int64_t last, uint32_t* to) {
  const int64_t in = b.matrix->in, pairs = 32 * b.matrix->words, sixteens = (b.tokens + 15) / 16;
  for (int64_t s = first; s < last; s++) {
    const int64_t block = s / (BATCH / 16) * (BATCH / 16), left = sixteens - block, tokens = b.tokens - 16 * s;
    const int64_t width = 16 * (left < BATCH / 16 ? left : BATCH / 16);
    const uint16_t* x = (const uint16_t*)b.x + 16 * s * b.x_stride;
    uint32_t* at = to + 16 * block * pairs + 16 * (s - block);
    for (int64_t k = 0; k < pairs; k += 16) {
      const int64_t columns = in - 2 * k;
      const __mmask32 some = columns >= 32 ? ~(__mmask32)0 : columns > 0 ? ((__mmask32)1 << columns) - 1 : 0;
      __m512i v[16];
      UNROLL for (int t = 0; t < 16; t++) v[t] = t < tokens ? _mm512_maskz_loadu_epi16(some, x + t * b.x_stride + 2 * k) : _mm512_setzero_si512();
      turn(v);
      UNROLL for (int i = 0; i < 16; i++) _mm512_store_si512(at + (k + i) * width, v[i]);
    }
  }
}

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

// Arranged activations from `begin` to `end`; those of one stretch begin at `x`.
struct Stretches {
  const uint32_t *begin, *end, *x;
};

template <int V>
void add_stretches(const uint16_t* tile, int64_t stride, const Stretches& s, int64_t pairs, float* sums, int64_t rows, bool fresh) {
  // Each group of rows fetches a part of the stretch that comes after this one, the first again for the next tile; never what lies
  // beyond, which another thread may be writing to.
  const uint32_t* next = s.x + 16 * V * pairs;
  for (int64_t r = 0, some; r < rows; r += some, next += 16 * pairs) {
    if (next + 16 * pairs > s.end) next = s.begin;
    some = r + SIDE <= rows ? SIDE : 1;
    (some == SIDE ? add_stretch<SIDE, V> : add_stretch<1, V>)(tile + r * stride, stride, s.x, pairs, sums + BATCH * r, fresh, next);
  }
}

// Up to 16 outputs, from row `first` on, of up to 16 tokens from `token` on; sums of a row lie BATCH apart from those of the next.
INLINE void deliver_some(const Batch& b, const float* sums, int64_t first, int64_t rows, int64_t token) {
  const Matrix& m = *b.matrix;
  const int64_t tokens = b.tokens - token;
  uint16_t* y = (uint16_t*)b.y + token * m.out + first;
  const __mmask16 some = (__mmask16)(rows >= 16 ? 0xffff : (1 << rows) - 1);
  __m512i v[16];
  UNROLL for (int r = 0; r < 16; r++) v[r] = r < rows ? _mm512_load_si512(sums + BATCH * r) : _mm512_setzero_si512();
  turn(v);
  const __m512 scales = m.scales && m.groups == 1 ? _mm512_maskz_loadu_ps(some, m.scales + first) : _mm512_set1_ps(1);
  const __m512 added = b.bias ? widen(_mm256_maskz_loadu_epi16(some, (const uint16_t*)b.bias + first)) : _mm512_setzero_ps();
  UNROLL for (int t = 0; t < 16; t++) {
    const __m512 sum = _mm512_fmadd_ps(_mm512_castsi512_ps(v[t]), scales, added);
    if (t < tokens) _mm256_mask_storeu_epi16(y + t * m.out, some, (__m256i)_mm512_cvtneps_pbh(sum));
  }
}

// A row of the tile times the scales of its groups.
void scale_row(const Matrix& m, const float* scales, uint16_t* row) {
  for (int64_t w = 0; w < m.words; w += m.group_words, scales++) {
    const __m512 scale = _mm512_set1_ps(*scales);
    const int64_t end = w + m.group_words < m.words ? w + m.group_words : m.words;
    for (uint16_t* at = row + 64 * w; at < row + 64 * end; at += 32) {
      const __m512 low = widen(_mm256_load_si256((const __m256i*)at)), high = widen(_mm256_load_si256((const __m256i*)(at + 16)));
      _mm512_store_si512(at, (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, scale), _mm512_mul_ps(low, scale)));
    }
  }
}

// Rows [first, last), `stride` columns apart; E::word(bits, values, out) writes 64 of them as bfloat16.
template <class E>
void fill_tile(const Matrix& m, int64_t first, int64_t last, uint16_t* tile, int64_t stride) {
  typedef typename E::Value Value;
  for (int64_t row = first; row < last; row++, tile += stride) {
    const Value* values = (const Value*)m.values + m.starts[row];
    const uint8_t* mask = m.bitmask + 8 * m.words * row;
    for (int64_t w = 0; w < m.words; w++) {
      const uint64_t bits = load_word(mask + 8 * w);
      UNROLL for (size_t line = 0; line < sizeof(Value); line++) fetch((const char*)values + VALUES_AHEAD + 64 * line);
      E::word(bits, values, tile + 64 * w);
      values += __builtin_popcountll(bits);
    }
    if (m.groups > 1) scale_row(m, m.scales + row * m.groups, tile);
  }
}

void tiled_gemm_rows(const Batch& b, const uint32_t* arranged, int64_t first, int64_t last, char* room) {
  const Matrix& m = *b.matrix;
  const int64_t rows = last - first, stride = 64 * m.words + TILE_PADDING, pairs = 32 * m.words;
  float* sums = (float*)room;
  uint16_t* tile = (uint16_t*)(sums + BATCH * rows);
  (m.type == TYPE_I8 ? fill_tile<Expand1As2> : fill_tile<Expand2>)(m, first, last, tile, stride);
  for (int64_t t = 0; t < b.tokens; t += BATCH) {
    const int64_t vectors = b.tokens - t >= BATCH ? BATCH / 16 : (b.tokens - t + 15) / 16;
    for (int64_t k = 0; k < pairs; k += STRETCH) {
      const Stretches x = {arranged, arranged + (b.tokens + 15) / 16 * 16 * pairs, arranged + t * pairs + 16 * vectors * k};
      const int64_t some = pairs - k < STRETCH ? pairs - k : STRETCH;
      (vectors == 1   ? add_stretches<1>
       : vectors == 2 ? add_stretches<2>
       : vectors == 3 ? add_stretches<3>
                      : add_stretches<4>)(tile + 2 * k, stride, x, some, sums, rows, k == 0);
    }
    for (int64_t i = t; i < b.tokens && i < t + BATCH; i += 16)
      for (int64_t r = 0; r < rows; r += 16) deliver_some(b, sums + BATCH * r + i - t, first + r, rows - r, i);
  }
}
