// Products of pairs by AMX, whose registers are tiles of sixteen rows of sixteen words: rows times a panel of pairs as it lies, of which
// sixteen words are one such tile for each vector. What is left of a depth is AVX-512's. Everything else is that of isa_avx512bf16.cpp.
#include <string.h>

#include "engines/cpu/table.h"

namespace rnnkernels::cpu {

namespace {

constexpr int kWords = 16, kRows = 16, kLineBytes = 64, kCopied = 128;  // copied: words of a row at a time

// Up to sixteen rows are one tile, which meets each of six vectors, the panel's tile the last of eight. More are two, which meet the same
// two vectors: half as much of the panel to load.
constexpr int kWide = 6;

// The shapes of the tiles, which last until somebody else sets them: loading them takes as long as some products.
struct alignas(64) Shapes {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
thread_local int shaped = 0;

void shape(int rows) {
  if (rows == shaped) return;
  Shapes shapes{};
  shapes.palette = 1;
  const int first = rows > kRows ? (rows + 1) / 2 : rows, second = rows - first;
  const int tall[] = {first, first, second, second, first, second, kWords, kWords};
  for (int i = 0; i < 8; ++i) {
    shapes.bytes[i] = kLineBytes;
    shapes.rows[i] = uint8_t(second ? tall[i] : i <= kWide ? rows : kWords);
  }
  // Of GCC 12's intrinsic the compiler learns that it reads the first word, and leaves the others out.
  __asm__ volatile("ldtilecfg\t%0" : : "m"(shapes));
  shaped = rows;
}

void start() { shaped = 0; }
void finish() {
  if (shaped) __asm__ volatile("tilerelease");
  shaped = 0;
}

// Asks for what is wanted soon, some lines with each of a product's steps.
class Asking {
 public:
  Asking(const Soon& soon, int64_t steps) : soon_(soon) {
    int64_t lines = 0;
    for (int i = 0; i < kPieces; ++i) lines += piece(i).lines();
    each_ = ceil_div(lines, steps);
  }
  void ask() {
    for (int64_t count = each_; count > 0 && piece_ < kPieces;) {
      const Ahead ahead = piece(piece_);
      const int64_t first = line_, end = ahead.lines() - first < count ? ahead.lines() : first + count;
      if (piece_ < kPieces - 1)
        for (int64_t i = first; i < end; ++i) __builtin_prefetch(ahead.line(i), 0, 2);
      else
        for (int64_t i = first; i < end; ++i) __builtin_prefetch(ahead.line(i), 1, 3);
      count -= end - first;
      line_ = end;
      if (end == ahead.lines()) ++piece_, line_ = 0;
    }
  }

 private:
  static constexpr int kPieces = 4;
  const Ahead& piece(int i) const { return i < kPieces - 1 ? soon_.reads[i] : soon_.writes; }

  const Soon& soon_;
  int64_t each_, line_ = 0;
  int piece_ = 0;
};

// No clobber: what tiles read was written by others, beyond what the compiler sees, or there is a barrier.
template <int tile>
inline void load(const void* from, int64_t row_bytes) {
  __asm__ volatile("tileloadd\t(%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(tile));
}
template <int tile>
inline void store(void* to, int64_t row_bytes) {
  __asm__ volatile("tilestored\t%%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(tile) : "memory");
}
template <int tile>
inline void clear() {
  __asm__ volatile("tilezero\t%%tmm%c0" : : "i"(tile));
}
template <int sum, int rows, int columns>
inline void add_product() {
  __asm__ volatile("tdpbf16ps\t%%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(rows), "i"(columns));
}

// What a product adds to and where it leaves its sums, bytes from row to row.
struct Places {
  const char* also;
  int64_t also_row;
  char* to;
  int64_t to_row;
  Places at(int row, int vector) const {
    return {also ? also + row * also_row + vector * kLineBytes : nullptr, also_row, to + row * to_row + vector * kLineBytes, to_row};
  }
};

// Tiles of sums begin with what is to be added: a step adds 32 products up before it adds them to a sum, so these are few.
template <int vectors, int first = 0>
inline void begin(const Places& places) {
  each<vectors>([&](auto i) __attribute__((always_inline)) {
    if (places.also)
      load<first + i.value>(places.also + i.value * kLineBytes, places.also_row);
    else
      clear<first + i.value>();
  });
}
template <int vectors, int first = 0>
inline void end(const Places& places) {
  each<vectors>([&](auto i) __attribute__((always_inline)) { store<first + i.value>(places.to + i.value * kLineBytes, places.to_row); });
}

// Calls step with the first row's of each sixteen words, and before it asks for some of what is wanted soon.
template <class Step>
inline __attribute__((always_inline)) void each_step(const char* a, int64_t words, Asking* asking, const Step& step) {
  const char* const end = a + words * 4;
  if (asking)
    for (; a < end; a += kLineBytes) asking->ask(), step(a);
  else
    for (; a < end; a += kLineBytes) step(a);
}

// Rows by some of a panel's vectors.
template <int vectors>
void multiply(const char* a, int64_t stride, const char* panel, int64_t panel_row, int64_t words, const Places& places, Asking* asking) {
  begin<vectors>(places);
  each_step(a, words, asking, [&](const char* a) __attribute__((always_inline)) {
    load<kWide>(a, stride);
    each<vectors>([&](auto i) __attribute__((always_inline)) {
      load<kWide + 1>(panel + i.value * kLineBytes, panel_row);
      add_product<i.value, kWide, kWide + 1>();
    });
    panel += kWords * panel_row;
  });
  end<vectors>(places);
}

// More than sixteen, the second half of them from row `half` on.
template <int vectors>
void multiply_tall(int half, const char* a, int64_t stride, const char* panel, int64_t panel_row, int64_t words, const Places& places,
                   Asking* asking) {
  const Places others = places.at(half, 0);
  begin<vectors>(places);
  begin<vectors, 2>(others);
  each_step(a, words, asking, [&](const char* a) __attribute__((always_inline)) {
    load<4>(a, stride);
    load<6>(panel, panel_row);
    add_product<0, 4, 6>();
    if constexpr (vectors > 1) {
      load<7>(panel + kLineBytes, panel_row);
      add_product<1, 4, 7>();
    }
    load<5>(a + half * stride, stride);
    add_product<2, 5, 6>();
    if constexpr (vectors > 1) add_product<3, 5, 7>();
    panel += kWords * panel_row;
  });
  end<vectors>(places);
  end<vectors, 2>(others);
}

template <int vectors>
void multiply_all(int rows, const char* a, int64_t stride, const char* panel, int64_t words, const Places& places, Asking* asking) {
  constexpr int64_t panel_row = vectors * kLineBytes;
  if (rows > kRows) {
    for (int v = 0; v + 1 < vectors; v += 2)
      multiply_tall<2>((rows + 1) / 2, a, stride, panel + v * kLineBytes, panel_row, words, places.at(0, v), asking);
    if constexpr (vectors % 2)
      multiply_tall<1>((rows + 1) / 2, a, stride, panel + (vectors - 1) * kLineBytes, panel_row, words, places.at(0, vectors - 1), asking);
  } else {
    constexpr int some = vectors <= kWide ? vectors : 4, others = vectors - some;
    multiply<some>(a, stride, panel, panel_row, words, places, asking);
    if constexpr (others > 0) multiply<others>(a, stride, panel + some * kLineBytes, panel_row, words, places.at(0, some), asking);
  }
}

// Of rows that lie anywhere: some words at a time side by side.
template <int vectors>
void multiply_copied(int rows, const void* const* operand, const char* panel, int64_t words, Places places, Asking* asking) {
  alignas(kLineBytes) char copy[kMaxTileRows][kCopied * 4 + kLineBytes];
  for (int64_t first = 0; first < words; first += kCopied) {
    const int64_t some = words - first < kCopied ? words - first : kCopied;
    for (int r = 0; r < rows; ++r) memcpy(copy[r], static_cast<const char*>(operand[r]) + first * 4, size_t(some) * 4);
    __asm__ volatile("" : : : "memory");  // the compiler does not know that tiles read it
    multiply_all<vectors>(rows, copy[0], sizeof copy[0], panel + first * vectors * kLineBytes, some, places, asking);
    places.also = places.to, places.also_row = places.to_row;
  }
}

template <int vectors>
void multiply_rows(int rows, const void* const* operand, const char* panel, int64_t depth, const Sums& sums, const Soon* soon) {
  const int64_t words = depth / kWords * kWords;
  const Places places{static_cast<const char*>(sums.also), sums.also_row * 4, static_cast<char*>(sums.to), sums.to_row * 4};
  if (words) {
    // One after the other: read at once, what was just written one by one would wait for all that was stored before.
    const auto apart = [&](int r) { return static_cast<const char*>(operand[r]) - static_cast<const char*>(operand[r - 1]); };
    int64_t stride = rows > 1 ? apart(1) : kLineBytes;
    for (int r = 2; r < rows && stride; ++r)
      if (apart(r) != stride) stride = 0;
    shape(rows);
    const auto run = [&](Asking* asking) {
      if (stride)
        multiply_all<vectors>(rows, static_cast<const char*>(operand[0]), stride, panel, words, places, asking);
      else
        multiply_copied<vectors>(rows, operand, panel, words, places, asking);
    };
    if (soon) {
      constexpr int wide = vectors > kWide ? 2 : 1, tall = (vectors + 1) / 2;  // how often the depth is walked
      Asking asking(*soon, words / kWords * (rows > kRows ? tall : wide));
      run(&asking);
    } else {
      run(nullptr);
    }
  }
  if (words && words == depth) return;
  constexpr int tall = kSumsOf32Registers / vectors < kMaxFmaRows ? kSumsOf32Registers / vectors : kMaxFmaRows;
  for (int r = 0; r < rows; r += tall) {
    const void* left[tall];
    const int count = rows - r < tall ? rows - r : tall;
    for (int i = 0; i < count; ++i) left[i] = static_cast<const char*>(operand[r + i]) + words * 4;
    Places some = places;
    if (words) some.also = some.to, some.also_row = some.to_row;
    some = some.at(r, 0);
    bfloat16_avx512.pairs.products.tile[vectors - 1][count - 1](left, panel + words * vectors * kLineBytes, depth - words,
                                                                {some.also, some.also_row / 4, some.to, some.to_row / 4},
                                                                words || r ? nullptr : soon);
  }
}

template <int vectors, int rows>
void product(const void* const* operand, const void* panel, int64_t depth, const Sums& sums, const Soon* soon) {
  multiply_rows<vectors>(rows, operand, static_cast<const char*>(panel), depth, sums, soon);
}

template <int vectors = 1, int rows = 1>
constexpr void add_products(Tiles& tiles) {
  tiles.tile[vectors - 1][rows - 1] = product<vectors, rows>;
  if constexpr (rows < kMaxTileRows) {
    add_products<vectors, rows + 1>(tiles);
  } else if constexpr (vectors < kMaxVectorsPerPanel) {
    add_products<vectors + 1>(tiles);
  }
}

constexpr Tiles products() {
  Tiles tiles{};
  add_products(tiles);
  return tiles;
}

}  // namespace

extern constexpr MatrixTiles tiles_amx = {products(), start, finish};

}  // namespace rnnkernels::cpu
