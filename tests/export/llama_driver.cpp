// Drives llama.cpp through its C interface.
//   loss MODEL LIBRARIES WINDOWS LENGTH < int32 tokens: mean log loss of all tokens but the first of each window
//   tokens MODEL LIBRARIES < texts, each ended by a zero byte: the token numbers of each text, one line each
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"

static double loss(const float* logits, int vocab, int token) {
  double top = *std::max_element(logits, logits + vocab), sum = 0;
  for (int i = 0; i < vocab; i++) sum += std::exp(logits[i] - top);
  return top + std::log(sum) - logits[token];
}

int main(int, char** argv) {
  llama_log_set([](ggml_log_level level, const char* text, void*) { if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr); }, nullptr);
  ggml_backend_load_all_from_path(argv[3]);
  llama_backend_init();
  const bool words = argv[1][0] == 't';
  auto options = llama_model_default_params();
  options.vocab_only = words;
  auto* model = llama_model_load_from_file(argv[2], options);
  if (!model) return 3;
  auto* vocab = llama_model_get_vocab(model);
  if (words) {
    for (std::string text; std::getline(std::cin, text, '\0');) {
      std::vector<llama_token> ids(text.size() + 16);
      const int n = llama_tokenize(vocab, text.data(), text.size(), ids.data(), ids.size(), true, true);
      for (int i = 0; i < n; i++) printf("%d ", ids[i]);
      puts("");
    }
    return 0;
  }
  const int windows = atoi(argv[4]), length = atoi(argv[5]), size = llama_vocab_n_tokens(vocab);
  std::vector<llama_token> ids(windows * length);
  if (fread(ids.data(), 4, ids.size(), stdin) != ids.size()) return 4;
  auto settings = llama_context_default_params();
  settings.n_ctx = settings.n_batch = settings.n_ubatch = length;
  settings.n_threads = settings.n_threads_batch = 1;
  auto* context = llama_init_from_model(model, settings);
  double sum = 0;
  for (int w = 0; w < windows; w++) {
    llama_memory_clear(llama_get_memory(context), true);
    auto batch = llama_batch_init(length, 0, 1);
    batch.n_tokens = length;
    for (int i = 0; i < length; i++) {
      batch.token[i] = ids[w * length + i], batch.pos[i] = i;
      batch.n_seq_id[i] = 1, batch.seq_id[i][0] = 0, batch.logits[i] = true;
    }
    if (llama_decode(context, batch)) return 5;
    for (int i = 0; i + 1 < length; i++) sum += loss(llama_get_logits_ith(context, i), size, ids[w * length + i + 1]);
    llama_batch_free(batch);
  }
  printf("%.6f\n", sum / (windows * (length - 1)));
}
