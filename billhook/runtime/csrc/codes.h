// Weights to codes, once for all instruction sets. Each file includes it inside its own anonymous namespace, after closest.h.
//
// Tensors are [columns, rows], so that a register holds rows of one column. No sum is contracted: all instruction sets give the same codes.
// There are no lambdas: GCC compiles those of a template without the instructions of its file.

constexpr int64_t LANES = 16;  // rows at a time, of which columns are copied side by side: a stride of many rows wastes the cache

#define PARTS_OF(i) UNROLL for (int64_t i = 0; i < Rows<Floats>::PARTS; i++)

template <class Floats>
struct Rows {
  static constexpr int64_t PARTS = LANES * sizeof(float) / sizeof(Floats);
  Floats part[PARTS];

  static INLINE Rows all(float value) {
    Rows found;
    PARTS_OF(i) found.part[i] = Floats{} + value;
    return found;
  }
  static INLINE Rows load(const float* at, int64_t lanes) {
    Rows found;
    if (lanes == LANES) {
      memcpy(found.part, at, LANES * sizeof(float));
    } else {
      found = all(0);
      memcpy(found.part, at, lanes * sizeof(float));
    }
    return found;
  }
  INLINE void store(float* at, int64_t lanes) const {
    lanes == LANES ? memcpy(at, part, LANES * sizeof(float)) : memcpy(at, part, lanes * sizeof(float));
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

// A group of columns of some rows; `at` is the place of the first row in [groups, rows].
template <class Floats>
struct CodeGroup {
  typedef Rows<Floats> R;
  R x[MOST_COLUMNS], sum_x = R::all(0);  // weighted
  const float* weight;
  int64_t columns, at, lanes;
  float sum = 0;

  INLINE CodeGroup(const SumsJob& job, int64_t g, int64_t row, int64_t some)
      : weight(job.weight + g * job.group), columns(job.group), at(g * job.rows + row), lanes(some) {
    for (int64_t c = 0; c < columns; c++) {
      x[c] = R::load(job.x + (g * columns + c) * job.rows + row, lanes);
      sum += weight[c];
      PARTS_OF(i) sum_x.part[i] += weight[c] * x[c].part[i];
    }
  }
};

// Sums over a group of weight times code, code^2 and code * x, for the codes nearest to (x - offset) / scale.
template <class Floats>
struct CodeSums {
  typedef Rows<Floats> R;
  R code = R::all(0), square = R::all(0), product = R::all(0);

  INLINE CodeSums(const Codes& codes, const CodeGroup<Floats>& group, const R& scale, const R& offset) {
    R inverse;
    PARTS_OF(i) {
      const Floats size = scale.part[i] < 0 ? -scale.part[i] : scale.part[i];
      inverse.part[i] = size > 1e-30f ? 1 / scale.part[i] : Floats{};
    }
    for (int64_t c = 0; c < group.columns; c++)
      PARTS_OF(i) {
        const Floats x = group.x[c].part[i], found = nearest(codes, (x - offset.part[i]) * inverse.part[i]);
        const Floats weighted = group.weight[c] * found;
        code.part[i] += weighted;
        square.part[i] += weighted * found;
        product.part[i] += weighted * x;
      }
  }
};

template <class Floats>
struct GivenScale {
  static INLINE void find(const SumsJob& job, const CodeGroup<Floats>& group) {
    typedef Rows<Floats> R;
    const int64_t size = job.groups * job.rows;
    const R scale = R::load(job.scale + group.at, group.lanes);
    const CodeSums<Floats> sums(job.codes, group, scale, job.offset ? R::load(job.offset + group.at, group.lanes) : R::all(0));
    sums.code.store(job.found + group.at, group.lanes);
    sums.square.store(job.found + size + group.at, group.lanes);
    sums.product.store(job.found + 2 * size + group.at, group.lanes);
  }
};

// The best of the scales `tried` times job.scale, each improved by least squares, and the sum of code^2.
template <class Floats>
struct BestScale {
  static INLINE void find(const SumsJob& job, const CodeGroup<Floats>& group) {
    typedef Rows<Floats> R;
    const R unit = R::load(job.scale + group.at, group.lanes);
    R best = R::all(__builtin_nanf("")), power = best, most = R::all(-__builtin_inff());  // NaN where x holds NaN
    for (int64_t t = 0; t < job.tries; t++) {
      R scale;
      PARTS_OF(i) scale.part[i] = unit.part[i] * job.tried[t];
      for (int times = 0; times < 2; times++) {
        const CodeSums<Floats> sums(job.codes, group, scale, R::all(0));
        PARTS_OF(i) {
          const Floats square = sums.square.part[i], product = sums.product.part[i], fitted = square > 0 ? product / square : Floats{};
          const Floats removed = product * fitted;
          best.part[i] = removed > most.part[i] ? fitted : best.part[i];
          power.part[i] = removed > most.part[i] ? square : power.part[i];
          most.part[i] = removed > most.part[i] ? removed : most.part[i];
          scale.part[i] = fitted;
        }
      }
    }
    best.store(job.found + group.at, group.lanes);
    power.store(job.found + job.groups * job.rows + group.at, group.lanes);
  }
};

// The best of the ranges that cut `tried` steps off the ends, two numbers a try, each improved by least squares, and the sum of code^2.
// Offsets are at most job.most.
template <class Floats>
struct BestRange {
  static INLINE Floats limited(Floats x, float most) { return x > most ? Floats{} + most : x; }

  static INLINE void find(const SumsJob& job, const CodeGroup<Floats>& group) {
    typedef Rows<Floats> R;
    const float sum = group.sum, limit = job.most;
    R low = group.x[0], high = low, least = R::all(__builtin_inff());
    R best = R::all(__builtin_nanf("")), shift = best, power = best;  // what is left where x holds NaN
    for (int64_t c = 1; c < group.columns; c++)
      PARTS_OF(i) {
        low.part[i] = group.x[c].part[i] < low.part[i] ? group.x[c].part[i] : low.part[i];
        high.part[i] = group.x[c].part[i] > high.part[i] ? group.x[c].part[i] : high.part[i];
      }
    PARTS_OF(i) low.part[i] = limited(low.part[i], limit);
    for (const float* cut = job.tried; cut < job.tried + 2 * job.tries; cut += 2) {
      R scale, offset;
      PARTS_OF(i) {
        scale.part[i] = (high.part[i] - low.part[i]) / (job.codes.high + cut[0] + cut[1]);
        offset.part[i] = limited(low.part[i] + cut[0] * scale.part[i], limit);
      }
      for (int times = 0; times < 2; times++) {
        const CodeSums<Floats> sums(job.codes, group, scale, offset);
        PARTS_OF(i) {
          const Floats c = sums.code.part[i], cc = sums.square.part[i], cx = sums.product.part[i], x = group.sum_x.part[i];
          const Floats determinant = sum * cc - c * c, a = (sum * cx - x * c) / determinant, b = (x * cc - c * cx) / determinant;
          const auto regular = (determinant > 1e-6f * sum * cc) & (b <= limit) & (a >= 0);
          const Floats alone = cc > 0 ? cx / cc : Floats{}, mean = cc > 0 ? Floats{} : limited(x / sum, limit);
          const Floats s = regular ? a : alone, o = regular ? b : mean;
          const Floats error = s * s * cc - 2 * s * cx + o * (o * sum - 2 * x + 2 * s * c);
          best.part[i] = error < least.part[i] ? s : best.part[i];
          shift.part[i] = error < least.part[i] ? o : shift.part[i];
          power.part[i] = error < least.part[i] ? cc : power.part[i];
          least.part[i] = error < least.part[i] ? error : least.part[i];
          scale.part[i] = s;
          offset.part[i] = o;
        }
      }
    }
    const int64_t size = job.groups * job.rows;
    best.store(job.found + group.at, group.lanes);
    shift.store(job.found + size + group.at, group.lanes);
    power.store(job.found + 2 * size + group.at, group.lanes);
  }
};

template <class Floats, class Kind>
void by_group(const SumsJob& job, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; row += LANES)
    for (int64_t g = 0; g < job.groups; g++) Kind::find(job, CodeGroup<Floats>(job, g, row, last - row < LANES ? last - row : LANES));
}

// The codes of one column after the other, each after x has made up for the errors of the columns before it.
template <class Floats>
void round_columns(const RoundJob& job, int64_t first, int64_t last) {
  typedef Rows<Floats> R;
  for (int64_t row = first; row < last; row += LANES) {
    const int64_t lanes = last - row < LANES ? last - row : LANES;
    R errors[MOST_COLUMNS];
    for (int64_t c = 0; c < job.columns; c++) {
      const int64_t here = c * job.rows + row, group = c / job.group * job.rows + row;
      const float* factor = job.factor + c * job.columns;
      R x = R::load(job.x + here, lanes), code;
      for (int64_t k = 0; k < c; k++) PARTS_OF(i) x.part[i] -= factor[k] * errors[k].part[i];
      const R scale = R::load(job.scale + group, lanes), inverse = R::load(job.inverse + group, lanes);
      const R offset = job.offset ? R::load(job.offset + group, lanes) : R::all(0);
      PARTS_OF(i) {
        x.part[i] -= offset.part[i];
        const Floats found = nearest(job.codes, x.part[i] * inverse.part[i]);
        code.part[i] = scale.part[i] == 0 ? Floats{} : found;
      }
      float* to = job.found + here;
      code.store(to, lanes);
      if (job.zero) {
        for (int64_t i = 0; i < lanes; i++) to[i] = job.zero[here + i] ? 0 : to[i];
        code = R::load(to, lanes);
      }
      PARTS_OF(i) errors[c].part[i] = (x.part[i] - code.part[i] * scale.part[i]) / factor[c];
      errors[c].store(job.errors + here, lanes);
    }
  }
}

// Every code in turn becomes the best one for the layer's output, all others fixed.
template <class Floats>
void move_codes(const MoveJob& job, int64_t first, int64_t last) {
  typedef Rows<Floats> R;
  for (int64_t row = first; row < last; row += LANES) {
    const int64_t lanes = last - row < LANES ? last - row : LANES;
    const R scale = R::load(job.scale + row, lanes), inverse = R::load(job.inverse + row, lanes);
    R slopes[MOST_COLUMNS];
    for (int64_t c = 0; c < job.columns; c++) slopes[c] = R::load(job.slope + c * job.rows + row, lanes);
    for (int64_t c = 0; c < job.columns; c++) {
      const int64_t here = c * job.rows + row;
      const R old = R::load(job.found + here, lanes), free = job.free ? R::load(job.free + here, lanes) : R::all(1);
      R code, delta, change = R::load(job.change + here, lanes);
      PARTS_OF(i) {
        code.part[i] = nearest(job.codes, old.part[i] - slopes[c].part[i] * job.step[c] * inverse.part[i]) * free.part[i];
        delta.part[i] = (code.part[i] - old.part[i]) * scale.part[i];
        change.part[i] += delta.part[i];
      }
      code.store(job.found + here, lanes);
      change.store(job.change + here, lanes);
      for (int64_t k = c + 1; k < job.columns; k++) PARTS_OF(i) slopes[k].part[i] += job.gram[c * job.columns + k] * delta.part[i];
    }
  }
}

#define CODE_KERNELS(Floats, Ints)                                                                                              \
  {                                                                                                                             \
    {closest<Floats, Ints, 4>, closest<Floats, Ints, 8>}, by_group<Floats, GivenScale<Floats>>, by_group<Floats, BestScale<Floats>>, \
        by_group<Floats, BestRange<Floats>>, round_columns<Floats>, move_codes<Floats>                                          \
  }
