#include "mask_loss/kernels.h"

#include "common/simd.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

static_assert(kLanes <= kMostLanes, "tables and rows have room for every vector");

// Interpolates vertically: the row of cells at row y of the pixels.
void upsample_row(const MaskPair& pair, int64_t y, float* __restrict cells) {
  const float* low = pair.logits + pair.rows.low[y] * pair.width;
  const float* high = pair.logits + pair.rows.high[y] * pair.width;
  const float share = pair.rows.share[y], rest = 1.0f - share;
  for (int64_t c = 0; c < pair.width; ++c) cells[c] = rest * low[c] + share * high[c];
}

// Interpolates horizontally: the logits of pixels x, x + 1, ... of the row.
MF_INLINE Floats upsample(const float* cells, const AxisTaps& columns, int64_t x) {
  const Floats share = load(columns.share + x);
  const int32_t first = columns.low[x];
  Floats low{}, high{};
  if (columns.high[x + kLanes - 1] - first < kLanes) {  // one vector holds all cells, as in upsampling
    const Floats near = load(cells + first);
    low = permute(near, load_ints(columns.low + x) - first);
    high = permute(near, load_ints(columns.high + x) - first);
  } else {
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = cells[columns.low[x + lane]];
      high[lane] = cells[columns.high[x + lane]];
    }
  }
  return (1.0f - share) * low + share * high;
}

// Returns where the mask is on at pixels x, x + 1, ...; x is a multiple of kLanes. Reads no byte beyond the one of
// pixel last - 1.
MF_INLINE Ints mask_at(const uint8_t* mask, int64_t x, int64_t last) {
  int32_t bits = mask[x / 8] >> x % 8;
  if (kLanes > 8 && x + 8 < last) bits |= mask[x / 8 + 1] << 8;
  return (broadcast(bits) & (broadcast(int32_t{1}) << lane_numbers())) != 0;
}

enum class Exponent { zero, one, two, other };

// Terms of the losses of a pixel. `wrong` is the probability of the value that the mask does not have there.
struct PixelTerms {
  Floats wrong, right, entropy, focus;  // wrong, 1 - wrong, cross-entropy, wrong^gamma
};

// Computes the terms from z, the logit of the wrong value.
template <Exponent exponent>
MF_INLINE PixelTerms pixel_terms(Floats z, float gamma) {
  const Ints positive = z > 0.0f;
  const Floats e = exp(select(positive, -z, z));  // e^-|z|
  const Floats small = log1p_unit(e), major = 1.0f / (1.0f + e), minor = e * major;
  PixelTerms pixel;
  pixel.wrong = select(positive, major, minor);
  pixel.right = select(positive, minor, major);
  pixel.entropy = max(z, Floats{}) + small;
  pixel.focus = exponent == Exponent::zero  ? broadcast(1.0f)
                : exponent == Exponent::one ? pixel.wrong
                : exponent == Exponent::two ? pixel.wrong * pixel.wrong
                                            : exp(-gamma * (max(-z, Floats{}) + small));
  return pixel;
}

// Returns the logits of the wrong value: x, negated where the mask is on.
MF_INLINE Floats wrong_logit(Floats x, Ints on) { return (Floats)((Ints)x ^ (on & INT32_MIN)); }

// Calls work(x, counted) for the vectors of a row; `counted` is a mask of lanes, and a constant where all lanes count.
template <class Work>
MF_INLINE void for_vectors(int64_t columns, const Work& work) {
  int64_t x = 0;
  for (; x + kLanes <= columns; x += kLanes) work(x, broadcast(int32_t{-1}));
  if (x < columns) work(x, lane_numbers() < static_cast<int32_t>(columns - x));
}

template <Exponent exponent>
void add(const MaskPair& pair, int64_t first, int64_t last, const MaskScratch& scratch, MaskSums& sums) {
  const Floats on_weight = broadcast(pair.loss.on_weight), off_weight = broadcast(pair.loss.off_weight);
  for (int64_t y = first; y < last; ++y) {
    const uint8_t* mask = pair.mask + y * pair.mask_bytes;
    Floats loss{}, overlap{}, total{}, broken{};
    Ints area{};
    upsample_row(pair, y, scratch.cells);
    for_vectors(pair.counted_columns, [&](int64_t x, Ints counted) {
      const Ints on = mask_at(mask, x, pair.counted_columns) & counted;
      const Floats logit = upsample(scratch.cells, pair.columns, x);
      const PixelTerms pixel = pixel_terms<exponent>(wrong_logit(logit, on), pair.loss.gamma);
      loss += select(counted, select(on, on_weight, off_weight) * pixel.focus * pixel.entropy, Floats{});
      overlap += select(on, pixel.right, Floats{});
      total += select(counted, select(on, pixel.right, pixel.wrong), Floats{});
      broken += select(counted, logit * 0.0f, Floats{});  // exp clamps, which would hide NaN
      area -= on;
    });
    const float nan_or_zero = sum(broken);
    sums.loss += sum(loss) + nan_or_zero;
    sums.overlap += sum(overlap) + nan_or_zero;
    sums.total += sum(total) + nan_or_zero;
    sums.area += sum(area);
  }
}

// Adds the transpose of the horizontal interpolation of `pixels` to `cells`, and clears the pixels for their next use.
void downsample_row(const AxisTaps& columns, int64_t count, float* pixels, float* cells) {
  for (int64_t x = 0; x < count;) {
    const int32_t cell = columns.low[x];
    float low = 0, high = 0;
    for (; x < count && columns.low[x] == cell; ++x) {
      low += (1.0f - columns.share[x]) * pixels[x];
      high += columns.share[x] * pixels[x];
      pixels[x] = 0;
    }
    cells[cell] += low;
    cells[columns.high[x - 1]] += high;
  }
}

// Adds the gradient by the logits of row y of the pixels to low_rows and high_rows, by the weights of the two rows of
// cells.
template <Exponent exponent>
void add_slopes(const MaskPair& pair, const MaskGradient& upstream, int64_t y, const MaskScratch& scratch) {
  const Floats on_loss = broadcast(-pair.loss.on_weight * upstream.loss);
  const Floats off_loss = broadcast(pair.loss.off_weight * upstream.loss);
  const Floats on_probability = broadcast(upstream.total + upstream.overlap);
  const Floats off_probability = broadcast(upstream.total);
  const float gamma = pair.loss.gamma, share = pair.rows.share[y], rest = 1.0f - share;
  const uint8_t* mask = pair.mask + y * pair.mask_bytes;
  upsample_row(pair, y, scratch.cells);
  for_vectors(pair.counted_columns, [&](int64_t x, Ints counted) {
    const Ints on = mask_at(mask, x, pair.counted_columns);
    const Floats logit = upsample(scratch.cells, pair.columns, x);
    const PixelTerms pixel = pixel_terms<exponent>(wrong_logit(logit, on), gamma);
    // pixel.right is at least e^-87, and must not be outweighed by an unbounded entropy
    const Floats entropy = min(pixel.entropy, broadcast(1e20f));
    const Floats loss = pixel.focus * (pixel.wrong + gamma * entropy * pixel.right);
    const Floats probability = pixel.wrong * pixel.right;
    const Floats slope = select(on, on_loss, off_loss) * loss +
                         (select(on, on_probability, off_probability) * probability + logit * 0.0f);
    const Floats kept = select(counted, slope, Floats{});
    store(scratch.low_rows + x, load(scratch.low_rows + x) + rest * kept);
    store(scratch.high_rows + x, load(scratch.high_rows + x) + share * kept);
  });
}

template <Exponent exponent>
void differentiate(const MaskPair& pair, const MaskGradient& upstream, int64_t first, int64_t last,
                   const MaskScratch& scratch, float* gradient) {
  for (int64_t i = first * pair.width; i < last * pair.width; ++i) gradient[i] = 0;
  MaskScratch rows = scratch;
  const auto clear = [&](float* pixels) {
    for (int64_t x = 0; x < pair.counted_columns; x += kLanes) store(pixels + x, Floats{});
  };
  const auto finish = [&](int64_t cell_row, float* pixels) {
    if (cell_row < first || cell_row >= last) return clear(pixels);  // a row of cells of another band
    downsample_row(pair.columns, pair.counted_columns, pixels, gradient + cell_row * pair.width);
  };
  clear(rows.low_rows), clear(rows.high_rows);
  int64_t at = -1;  // row of cells of rows.low_rows
  for (int64_t y = 0; y < pair.counted_rows && pair.rows.low[y] < last; ++y) {
    if (pair.rows.high[y] < first) continue;
    const int64_t low = pair.rows.low[y];
    if (low != at) {
      finish(at, rows.low_rows);
      if (low == at + 1) {
        float* next = rows.high_rows;
        rows.high_rows = rows.low_rows, rows.low_rows = next;
      } else {
        finish(at + 1, rows.high_rows);
      }
      at = low;
    }
    add_slopes<exponent>(pair, upstream, y, rows);
  }
  finish(at, rows.low_rows);
  finish(at + 1, rows.high_rows);
}

}  // namespace

void add_mask(const MaskPair& pair, int64_t first, int64_t last, const MaskScratch& scratch, MaskSums& sums) {
  const float gamma = pair.loss.gamma;
  const auto chosen = gamma == 0.0f   ? add<Exponent::zero>
                      : gamma == 1.0f ? add<Exponent::one>
                      : gamma == 2.0f ? add<Exponent::two>
                                      : add<Exponent::other>;
  chosen(pair, first, last, scratch, sums);
}

void differentiate_mask(const MaskPair& pair, const MaskGradient& upstream, int64_t first, int64_t last,
                        const MaskScratch& scratch, float* gradient) {
  const float gamma = pair.loss.gamma;
  const auto chosen = gamma == 0.0f   ? differentiate<Exponent::zero>
                      : gamma == 1.0f ? differentiate<Exponent::one>
                      : gamma == 2.0f ? differentiate<Exponent::two>
                                      : differentiate<Exponent::other>;
  chosen(pair, upstream, first, last, scratch, gradient);
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
