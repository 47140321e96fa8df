// Turning instructions on for a part of a file. The rest of the library is compiled for any processor of the architecture.
#pragma once

#define PUBLIC extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))
#define TOKENS_1_TO_8(function, K) \
  { function<K, 1>, function<K, 2>, function<K, 3>, function<K, 4>, function<K, 5>, function<K, 6>, function<K, 7>, function<K, 8> }
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define TARGET_BEGIN_(text) _Pragma(text)
#define STRING_(text) #text
#define TARGET_BEGIN(features) TARGET_BEGIN_(STRING_(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define TARGET_END _Pragma("clang attribute pop")
#else
#define UNROLL _Pragma("GCC unroll 16")
#define TARGET_BEGIN_(text) _Pragma(text)
#define STRING_(text) #text
#define TARGET_BEGIN(features) _Pragma("GCC push_options") TARGET_BEGIN_(STRING_(GCC target(features)))
#define TARGET_END _Pragma("GCC pop_options")
#endif
