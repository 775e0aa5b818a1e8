// The one assertion of the C++ tests: says what went wrong, counts it, goes on.
#pragma once

#include <cstdarg>
#include <cstdio>

inline int check_failures = 0;

[[gnu::format(printf, 2, 3)]] inline bool check(bool ok, const char* format, ...) {
  constexpr int kShown = 50;
  if (!ok && ++check_failures <= kShown) {
    va_list arguments;
    va_start(arguments, format);
    std::printf("FAILED ");
    std::vprintf(format, arguments);
    std::printf("\n");
    va_end(arguments);
  }
  return ok;
}
