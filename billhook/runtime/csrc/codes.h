// Weights to codes, once for all instruction sets. Each file includes it inside its own anonymous namespace, after closest.h.
//
// Tensors are [columns, rows], so that a register holds rows of one column. No sum is contracted: all instruction sets give the same codes.

constexpr int64_t LANES = 16;  // rows at a time

template <class Floats>
struct Rows {
  static constexpr int64_t PARTS = LANES * sizeof(float) / sizeof(Floats);
  Floats part[PARTS] = {};

  static INLINE Rows load(const float* at, int64_t lanes) {
    Rows found;
    lanes == LANES ? memcpy(found.part, at, LANES * sizeof(float)) : memcpy(found.part, at, lanes * sizeof(float));
    return found;
  }
  INLINE void store(float* at, int64_t lanes) const {
    lanes == LANES ? memcpy(at, part, LANES * sizeof(float)) : memcpy(at, part, lanes * sizeof(float));
  }
  template <class Operation>
  INLINE void each(const Operation& operation) {
    UNROLL for (int64_t i = 0; i < PARTS; i++) part[i] = operation(part[i], i);
  }
};

// The codes nearest to x: integers half to even, points upwards.
template <class Floats>
INLINE Floats nearest(const Codes& codes, Floats x) {
  if (!codes.points) {
    const Floats shift = Floats{} + 0x1.8p23f;  // the sum has no bits for fractions
    x = x < codes.low ? Floats{} + codes.low : x;
    x = x > codes.high ? Floats{} + codes.high : x;
    return (x + shift) - shift;
  }
  const Floats size = codes.mirrored ? (x < 0 ? -x : x) : x;
  Floats code = Floats{} + codes.points[0];
  for (int64_t i = 1; i < codes.count; i++)
    code = size >= (codes.points[i - 1] + codes.points[i]) / 2 ? Floats{} + codes.points[i] : code;
  return codes.mirrored ? (x < 0 ? -code : code) : code;
}

// Sums over each group of weight times code, code^2 and code * x, for the codes nearest to (x - offset) * inverse.
template <class Floats>
void code_sums(const SumsJob& job, int64_t first, int64_t last) {
  typedef Rows<Floats> R;
  for (int64_t row = first; row < last; row += LANES) {
    const int64_t lanes = last - row < LANES ? last - row : LANES;
    for (int64_t g = 0; g < job.groups; g++) {
      const int64_t here = g * job.rows + row, size = job.groups * job.rows;
      const R inverse = R::load(job.inverse + here, lanes), offset = job.offset ? R::load(job.offset + here, lanes) : R();
      R sum, power, product;
      for (int64_t c = g * job.group; c < (g + 1) * job.group; c++) {
        const R x = R::load(job.x + c * job.rows + row, lanes);
        UNROLL for (int64_t i = 0; i < R::PARTS; i++) {
          const Floats code = nearest(job.codes, (x.part[i] - offset.part[i]) * inverse.part[i]), weighted = job.weight[c] * code;
          sum.part[i] += weighted;
          power.part[i] += weighted * code;
          product.part[i] += weighted * x.part[i];
        }
      }
      sum.store(job.sums + here, lanes);
      power.store(job.sums + size + here, lanes);
      product.store(job.sums + 2 * size + here, lanes);
    }
  }
}

// The codes of one column after the other, each after x has made up for the errors of the columns before it.
template <class Floats>
void round_columns(const RoundJob& job, int64_t first, int64_t last) {
  typedef Rows<Floats> R;
  for (int64_t row = first; row < last; row += LANES) {
    const int64_t lanes = last - row < LANES ? last - row : LANES;
    for (int64_t c = 0; c < job.columns; c++) {
      const int64_t here = c * job.rows + row, group = c / job.group * job.rows + row;
      const float* factor = job.factor + c * job.columns;
      R x = R::load(job.x + here, lanes), code;
      for (int64_t k = 0; k < c; k++) {
        const R error = R::load(job.errors + k * job.rows + row, lanes);
        x.each([&](Floats value, int64_t i) { return value - factor[k] * error.part[i]; });
      }
      const R scale = R::load(job.scale + group, lanes), inverse = R::load(job.inverse + group, lanes);
      if (job.offset) {
        const R offset = R::load(job.offset + group, lanes);
        x.each([&](Floats value, int64_t i) { return value - offset.part[i]; });
      }
      code.each([&](Floats, int64_t i) {
        const Floats found = nearest(job.codes, x.part[i] * inverse.part[i]);
        return scale.part[i] == 0 ? Floats{} : found;
      });
      float* to = job.found + here;
      code.store(to, lanes);
      if (job.zero) {
        for (int64_t i = 0; i < lanes; i++) to[i] = job.zero[here + i] ? 0 : to[i];
        code = R::load(to, lanes);
      }
      x.each([&](Floats value, int64_t i) { return (value - code.part[i] * scale.part[i]) / factor[c]; });
      x.store(job.errors + here, lanes);
    }
  }
}

// Every code in turn becomes the best one for the layer's output, all others fixed; `slope` is the error times the Gram matrix.
template <class Floats>
void move_codes(const MoveJob& job, int64_t first, int64_t last) {
  typedef Rows<Floats> R;
  for (int64_t row = first; row < last; row += LANES) {
    const int64_t lanes = last - row < LANES ? last - row : LANES;
    const R scale = R::load(job.scale + row, lanes), inverse = R::load(job.inverse + row, lanes);
    for (int64_t c = 0; c < job.columns; c++) {
      const int64_t here = c * job.rows + row;
      const R slope = R::load(job.slope + here, lanes), old = R::load(job.found + here, lanes);
      R code, delta, change = R::load(job.change + here, lanes);
      code.each([&](Floats, int64_t i) { return nearest(job.codes, old.part[i] - slope.part[i] * job.step[c] * inverse.part[i]); });
      if (job.free) {
        const R free = R::load(job.free + here, lanes);
        code.each([&](Floats value, int64_t i) { return value * free.part[i]; });
      }
      delta.each([&](Floats, int64_t i) { return (code.part[i] - old.part[i]) * scale.part[i]; });
      change.each([&](Floats value, int64_t i) { return value + delta.part[i]; });
      code.store(job.found + here, lanes);
      change.store(job.change + here, lanes);
      for (int64_t k = c + 1; k < job.columns; k++) {
        R later = R::load(job.slope + k * job.rows + row, lanes);
        later.each([&](Floats value, int64_t i) { return value + job.gram[c * job.columns + k] * delta.part[i]; });
        later.store(job.slope + k * job.rows + row, lanes);
      }
    }
  }
}

#define CODE_KERNELS(Floats, Ints) \
  { {closest<Floats, Ints, 4>, closest<Floats, Ints, 8>}, code_sums<Floats>, round_columns<Floats>, move_codes<Floats> }
