// The loops of the quantizers, rows shared among threads.
#include "billhook.h"
#include "target.h"
#include "threads.h"

namespace {

// Calls kernel(job, first, last) for sixteens of rows; `work` is the number of operations.
template <class Job>
void share_rows(void (*kernel)(const Job&, int64_t, int64_t), const Job& job, int64_t work, int threads) {
  share((job.rows + 15) / 16, work, threads, [&](int64_t first, int64_t last) {
    kernel(job, 16 * first, 16 * last < job.rows ? 16 * last : job.rows);
  }, 2);
}

}  // namespace

// found [vectors] are the rows of the table [points, dim + 1] closest to vectors of 4 or 8 numbers, x [dim, vectors].
PUBLIC void billhook_closest(const float* x, int64_t vectors, int64_t dim, const float* table, int64_t points, int32_t* found, int path,
                             int threads) {
  const ClosestKernel kernel = PATHS[path]->codes.closest[dim == 8];
  share((vectors + 63) / 64, vectors * points, threads, [&](int64_t first, int64_t last) {
    kernel(x, vectors, table, points, 64 * first, 64 * last < vectors ? 64 * last : vectors, found);
  });
}

PUBLIC void billhook_code_sums(const SumsJob* job, int path, int threads) {
  share_rows(PATHS[path]->codes.sums, *job, job->groups * job->group * job->rows, threads);
}

PUBLIC void billhook_search_scale(const SumsJob* job, int path, int threads) {
  share_rows(PATHS[path]->codes.search_scale, *job, 2 * job->tries * job->groups * job->group * job->rows, threads);
}

PUBLIC void billhook_search_range(const SumsJob* job, int path, int threads) {
  share_rows(PATHS[path]->codes.search_range, *job, 2 * job->tries * job->groups * job->group * job->rows, threads);
}

PUBLIC void billhook_round_columns(const RoundJob* job, int path, int threads) {
  share_rows(PATHS[path]->codes.round, *job, job->columns * job->columns * job->rows / 8, threads);
}

PUBLIC void billhook_move_codes(const MoveJob* job, int path, int threads) {
  share_rows(PATHS[path]->codes.move, *job, job->columns * job->columns * job->rows / 8, threads);
}
