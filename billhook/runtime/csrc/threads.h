// Work shared among OpenMP's threads.
#pragma once

#include <pthread.h>
#include <stdint.h>

// OpenMP's threads do not survive a fork, and asking for them in the child waits for ever. There one thread does the work.
inline bool forked = false;
struct AtFork {
  AtFork() {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
  }
};
inline AtFork at_fork;

const int64_t WORTH_A_THREAD = 1 << 17;  // bytes to read; waking a thread takes as long as reading about this much

// Calls work(first, last) for pieces of the rows on up to `threads` threads, `each` pieces for every thread; whoever is done takes the next.
template <class Work>
void share(int64_t rows, int64_t bytes, int threads, const Work& work, int each = 8) {
  if (threads > bytes / WORTH_A_THREAD) threads = (int)(bytes / WORTH_A_THREAD);
  if (threads <= 1 || forked) return work(0, rows);
  const int64_t piece = (rows + each * threads - 1) / (each * threads);
  int64_t next = 0;
#pragma omp parallel num_threads(threads)
  for (;;) {
    const int64_t first = __atomic_fetch_add(&next, piece, __ATOMIC_RELAXED);
    if (first >= rows) break;
    work(first, first + piece < rows ? first + piece : rows);
  }
}

// Calls work(thread, first, last) for tiles of up to `size` rows. Each thread has a run of tiles, and then helps the others: neighbouring tiles
// share lines of the result and follow each other in memory. `taken` is 64 bytes a thread, zeroed here.
template <class Work>
void share_tiles(int64_t rows, int64_t size, int threads, int64_t* taken, const Work& work) {
  int64_t slots = 0;
  if (size * threads > rows) size = (rows + threads - 1) / threads;
  for (int64_t i = 0; i < threads; i++) taken[8 * i] = 0;
  const int64_t tiles = (rows + size * threads - 1) / (size * threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t slot = __atomic_fetch_add(&slots, 1, __ATOMIC_RELAXED);
    for (int64_t run = slot; run < slot + threads; run++)
      for (;;) {
        const int64_t i = __atomic_fetch_add(&taken[run % threads * 8], 1, __ATOMIC_RELAXED);
        const int64_t first = size * (run % threads * tiles + i);
        if (i >= tiles || first >= rows) break;
        work(slot, first, first + size < rows ? first + size : rows);
      }
  }
}
