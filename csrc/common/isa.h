// Which copy of the code that is compiled once per instruction set (setup.py, simd.h) runs on this CPU.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace avfast {

// Names of the sets that were compiled and that this CPU has, best first: "avx512", "avx2", "baseline".
inline std::vector<const char*> instruction_sets() {
  std::vector<const char*> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) found.push_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back("avx2");
#endif
  found.push_back("baseline");
  return found;
}

// Returns the table of the set that the environment variable AVFAST_ISA names, or of the best set where it is not set.
// Throws std::invalid_argument where this CPU or build has no such set.
template <class Table>
const Table& choose_isa(const Table* avx512, const Table* avx2, const Table* baseline) {
  static const std::vector<const char*> sets = instruction_sets();
  const char* const asked = std::getenv("AVFAST_ISA");
  const std::string_view wanted = asked == nullptr || *asked == '\0' ? sets[0] : asked;
  for (const std::string_view name : sets) {
    if (name == wanted) return *(name == "avx512" ? avx512 : name == "avx2" ? avx2 : baseline);
  }
  std::string message = "AVFAST_ISA is '" + std::string(wanted) + "', expected one of ";
  for (const char* name : sets) message += std::string(name == sets[0] ? "" : ", ") + name;
  throw std::invalid_argument(message + " on this CPU");
}

// &avx512::NAME, &avx2::NAME, &baseline::NAME, as far as they are compiled.
#if defined(__x86_64__)
#define AVFAST_TABLES(name) &avfast::avx512::name, &avfast::avx2::name, &avfast::baseline::name
#else
#define AVFAST_TABLES(name) &avfast::baseline::name, &avfast::baseline::name, &avfast::baseline::name
#endif

}  // namespace avfast
