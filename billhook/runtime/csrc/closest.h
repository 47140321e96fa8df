// The points of a table closest to vectors, once for all instruction sets. Each file includes it inside its own anonymous namespace.
//
// A row of the table, DIM + 1 floats, is a linear function of the vector: c . x + c[DIM]. The row with the largest value is found, the first
// of equal ones, and the first of all where x holds NaN. Vectors lie side by side, x [DIM][stride].

typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints4 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef int32_t Ints8 __attribute__((vector_size(32)));

#if defined(__aarch64__)
typedef Floats4 WideFloats;
typedef Ints4 WideInts;
#else
typedef Floats8 WideFloats;
typedef Ints8 WideInts;
#endif

// Floats and Ints are what a register holds.
template <class Floats, class Ints, int DIM>
void closest(const float* x, int64_t stride, const float* table, int64_t points, int64_t first, int64_t last, int32_t* found) {
  constexpr int64_t LANES = 16, PARTS = LANES * sizeof(float) / sizeof(Floats);
  for (int64_t at = first; at < last; at += LANES) {
    const int64_t lanes = last - at < LANES ? last - at : LANES;
    Floats a[DIM][PARTS] = {}, best[PARTS];
    Ints index[PARTS] = {};
    for (int d = 0; d < DIM; d++) memcpy(a[d], x + d * stride + at, lanes * sizeof(float));
    for (int part = 0; part < PARTS; part++) best[part] = Floats{} - __builtin_inff();
    const float* c = table;
    for (int32_t point = 0; point < points; point++, c += DIM + 1)
      UNROLL for (int part = 0; part < PARTS; part++) {
        Floats value = c[0] * a[0][part];
        UNROLL for (int d = 1; d < DIM; d++) value += c[d] * a[d][part];
        value += c[DIM];
        const Ints better = value > best[part];
        index[part] = (better & point) | (~better & index[part]);
        best[part] = value > best[part] ? value : best[part];
      }
    memcpy(found + at, index, lanes * sizeof(int32_t));
  }
}
