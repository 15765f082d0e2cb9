// The samples of a query and head are computed as vectors, one lane a sample: softmax, location, and for each of the
// four corners a cell and a weight. Cells and weights go to scratch memory. A loop over samples then adds up the rows
// of channels of these cells. A corner outside the level has weight zero and the cell of the nearest corner inside,
// which the sample reads anyway, so that no value gets into a sum that does not belong there.
#include "deformable_attention/kernels.h"

#include "common/elements.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

static_assert(kSamplePanel % kLanes == 0, "arrays have room for every vector");

// Vectors of channels whose sums are in registers at a time, twice.
#if defined(__AVX512F__)
constexpr int kVectors = 2;
#else
constexpr int kVectors = 4;
#endif

constexpr int64_t kAhead = 4;  // rows after the current one that the backward pass asks for

constexpr float kInfinity = __builtin_inff();

// Arrays of the samples of a query and head. Corners are top left, top right, low left and low right.
struct Samples {
  float* weight;      // softmax of the logits
  int32_t* cell[4];   // the first is negative where the sample is outside the level
  float* share[4];    // what of the corner is in the sum, times `weight`
  // for the gradient only
  float* x_share[2];  // of the left and right column, zero outside
  float* y_share[2];
  float* x_slope[2];  // derivatives of the shares
  float* y_slope[2];
  float* product[4];  // upstream gradient times the corner's channels
};

template <bool for_gradient>
Samples arrays(float* memory, int64_t stride) {
  Samples samples{};
  float* next = memory;
  const auto take = [&] {
    float* array = next;
    next += stride;
    return array;
  };
  samples.weight = take();
  for (int corner = 0; corner < 4; ++corner) samples.cell[corner] = reinterpret_cast<int32_t*>(take());
  for (int corner = 0; corner < 4; ++corner) samples.share[corner] = take();
  if (!for_gradient) return samples;
  for (int side = 0; side < 2; ++side) {
    samples.x_share[side] = take(), samples.y_share[side] = take();
    samples.x_slope[side] = take(), samples.y_slope[side] = take();
  }
  for (int corner = 0; corner < 4; ++corner) samples.product[corner] = take();
  return samples;
}

// Returns lanes 0, 2, 4, ... of a and b, or with `odd` 1, 3, 5, ...
MF_INLINE Floats every_second(Floats a, Floats b, int odd) {
  const Ints lanes = (2 * lane_numbers() + odd) & (kLanes - 1);
  return select(lane_numbers() < kLanes / 2, permute(a, lanes), permute(b, lanes));
}

// Returns x[0], y[0], x[1], ... from lane `first` of x and y.
MF_INLINE Floats alternate(Floats x, Floats y, int first) {
  const Ints lanes = lane_numbers() / 2 + first;
  return select((lane_numbers() & 1) == 0, permute(x, lanes), permute(y, lanes));
}

// Asks for elements that will be read soon.
template <class Element>
MF_INLINE void prefetch(const Element* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(Element))) __builtin_prefetch(p + i);
}

// Writes the locations of a query's reference points, one for each sample; -inf beyond the samples.
void read_reference_points(const DeformableAttention& attention, const SampleLevels& levels, int64_t query, float* x,
                           float* y) {
  const float* points = attention.reference_points + query * attention.levels * 2;
  for (int64_t sample = 0, level = 0; level < attention.levels; ++level) {
    const float column = points[2 * level] * levels.width[sample] - 0.5f;
    const float row = points[2 * level + 1] * levels.height[sample] - 0.5f;
    for (const int64_t end = sample + attention.points; sample < end; ++sample) x[sample] = column, y[sample] = row;
  }
  for (int64_t sample = levels.samples; sample < levels.stride; ++sample) x[sample] = y[sample] = -kInfinity;
}

// Computes the weights -> zero, or NaN where they are not defined.
template <class Element>
MF_INLINE float soften(const SampleLevels& levels, const Element* logits, float* weight) {
  Floats largest = broadcast(-kInfinity);
  for (int64_t k = 0; k < levels.stride; k += kLanes) {
    const Floats logit = load_elements(logits + k, levels.samples - k);
    const Ints present = lane_numbers() < static_cast<int32_t>(levels.samples - k);
    store(weight + k, select(present, logit, broadcast(-kInfinity)));
    largest = max(load(weight + k), largest);
  }
  const Floats top = broadcast(highest(largest));
  Floats total{};
  Ints defined = broadcast(int32_t{-1});
  for (int64_t k = 0; k < levels.stride; k += kLanes) {
    const Floats logit = load(weight + k) - top;
    defined &= logit <= 0.0f;
    const Floats power = select(logit < -87.0f, Floats{}, exp(logit));
    store(weight + k, power);
    total += power;
  }
  const float nan_or_zero = sum(select(defined, Floats{}, broadcast(__builtin_nanf(""))));
  const Floats inverse = broadcast(1.0f / sum(total) + nan_or_zero);
  for (int64_t k = 0; k < levels.stride; k += kLanes) store(weight + k, load(weight + k) * inverse);
  return nan_or_zero;
}

// One axis of a vector of samples.
struct Axis {
  Ints inside;    // whether the sample reads anything
  Ints cell[2];   // the nearest cells before and behind, moved into the level
  Floats share[2], slope[2];
};

MF_INLINE Axis locate(Floats x, Floats size) {
  Axis axis;
  axis.inside = (x > -1.0f) & (x < size);
  x = select(axis.inside, x, Floats{});
  const Ints whole = __builtin_convertvector(x, Ints);
  const Ints low = whole + (__builtin_convertvector(whole, Floats) > x);  // true is -1
  const Ints last = __builtin_convertvector(size, Ints) - 1;
  const Ints has_low = low >= 0, has_high = low < last;
  const Floats share = x - __builtin_convertvector(low, Floats);
  axis.cell[0] = select(has_low, low, Ints{});
  axis.cell[1] = select(has_high, low + 1, last);
  axis.share[0] = select(has_low, 1.0f - share, Floats{});
  axis.share[1] = select(has_high, share, Floats{});
  axis.slope[0] = select(has_low, broadcast(-1.0f), Floats{});
  axis.slope[1] = select(has_high, broadcast(1.0f), Floats{});
  return axis;
}

// Fills the arrays of a query and head -> zero, or NaN where its weights are not defined.
template <bool for_gradient, class Element>
float prepare(const SampleLevels& levels, const Element* offsets, const Element* logits, const float* x,
              const float* y, const Samples& samples) {
  const float nan_or_zero = soften(levels, logits, samples.weight);
  for (int64_t k = 0; k < levels.stride; k += kLanes) {
    const int64_t left = 2 * (levels.samples - k);
    const Floats near = load_elements(offsets + 2 * k, left);
    const Floats far = left > kLanes ? load_elements(offsets + 2 * k + kLanes, left - kLanes) : Floats{};
    const Floats width = load(levels.width + k);
    const Axis column = locate(load(x + k) + every_second(near, far, 0), width);
    const Axis row = locate(load(y + k) + every_second(near, far, 1), load(levels.height + k));
    const Ints first = load_ints(levels.first + k), columns = __builtin_convertvector(width, Ints);
    const Ints inside = column.inside & row.inside;
    const Floats weight = load(samples.weight + k);
    for (int low = 0; low < 2; ++low) {
      const Ints line = first + row.cell[low] * columns;
      for (int right = 0; right < 2; ++right) {
        const Ints cell = line + column.cell[right];
        const int corner = 2 * low + right;
        store(samples.cell[corner] + k, corner == 0 ? select(inside, cell, broadcast(int32_t{-1})) : cell);
        store(samples.share[corner] + k, weight * row.share[low] * column.share[right]);
      }
    }
    if (for_gradient) {
      for (int side = 0; side < 2; ++side) {
        store(samples.x_share[side] + k, column.share[side]), store(samples.y_share[side] + k, row.share[side]);
        store(samples.x_slope[side] + k, column.slope[side]), store(samples.y_slope[side] + k, row.slope[side]);
      }
    }
  }
  return nan_or_zero;
}

// Adds up `vectors` vectors of channels of all samples and stores the first `channels` channels. With `partial`, there
// is one vector, and no more than these channels are read.
template <int vectors, bool partial, class Element>
MF_INLINE void add_samples(const Samples& samples, int64_t count, const Element* value, int64_t stride, float start,
                           int64_t channels, Element* result) {
  Floats top[vectors], low[vectors];
  for (int v = 0; v < vectors; ++v) top[v] = low[v] = broadcast(start);
  for (int64_t k = 0; k < count; ++k) {
    if (samples.cell[0][k] < 0) continue;
    const Element* rows[4];
    Floats shares[4];
    for (int corner = 0; corner < 4; ++corner) {
      rows[corner] = value + samples.cell[corner][k] * stride;
      shares[corner] = broadcast(samples.share[corner][k]);
    }
    for (int v = 0; v < vectors; ++v) {
      const auto read = [&](int corner) __attribute__((always_inline)) {
        return partial ? load_elements(rows[corner], channels) : load_elements(rows[corner] + v * kLanes);
      };
      top[v] += shares[0] * read(0);
      low[v] += shares[2] * read(2);
      top[v] += shares[1] * read(1);
      low[v] += shares[3] * read(3);
    }
  }
  for (int v = 0; v < vectors; ++v) {
    store_elements(result + v * kLanes, top[v] + low[v], partial ? channels : kLanes);
  }
}

template <class Element>
void attend(const DeformableAttention& attention, const SampleLevels& levels, const Element* value,
            const Element* offsets, const Element* logits, Element* result, int64_t first, int64_t last,
            float* scratch) {
  const int64_t heads = attention.heads, dim = attention.dim, stride = heads * dim;
  float* x = scratch;
  float* y = x + levels.stride;
  float* starts = y + levels.stride;
  float* memory = starts + heads;
  for (int64_t query = first; query < last; ++query) {
    read_reference_points(attention, levels, query, x, y);
    const int64_t next = (query + 1 < last ? query + 1 : query) * heads * levels.samples;
    prefetch(offsets + 2 * next, 2 * heads * levels.samples);
    prefetch(logits + next, heads * levels.samples);
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t row = (query * heads + head) * levels.samples;
      starts[head] = prepare<false>(levels, offsets + 2 * row, logits + row, x, y,
                                    arrays<false>(memory + head * kForwardArrays * levels.stride, levels.stride));
    }
    const Element* image = value + query / attention.queries * attention.cells * stride;
    for (int64_t head = 0; head < heads; ++head) {
      const Samples samples = arrays<false>(memory + head * kForwardArrays * levels.stride, levels.stride);
      const Element* source = image + head * dim;
      Element* target = result + query * stride + head * dim;
      int64_t c = 0;
      for (; c + kVectors * kLanes <= dim; c += kVectors * kLanes) {
        add_samples<kVectors, false>(samples, levels.samples, source + c, stride, starts[head], dim - c, target + c);
      }
      for (; c + kLanes <= dim; c += kLanes) {
        add_samples<1, false>(samples, levels.samples, source + c, stride, starts[head], dim - c, target + c);
      }
      if (c < dim) {
        add_samples<1, true>(samples, levels.samples, source + c, stride, starts[head], dim - c, target + c);
      }
    }
  }
}

// Returns a vector whose lanes at multiples of 2 * step (and `step` behind) hold sums of lanes of a (and b).
MF_INLINE Floats merge(Floats a, Floats b, int step) {
  const Ints odd = (lane_numbers() & step) != 0;
  return select(odd, b, a) + permute(select(odd, a, b), lane_numbers() ^ step);
}

// Adds up the lanes of each of four vectors.
MF_INLINE void add_lanes(const Floats* vectors, float* const* sums, int64_t place) {
  Floats all = merge(merge(vectors[0], vectors[1], 1), merge(vectors[2], vectors[3], 1), 2);
  for (int step = 4; step < kLanes; step *= 2) all += permute(all, lane_numbers() ^ step);
  for (int i = 0; i < 4; ++i) sums[i][place] = all[i];
}

// Adds the gradient by the cells that the samples read to `by_cell`, whose rows are `width` floats, and computes the
// products. upstream: [width], zeros beyond the channels, as in the rows of `value`.
void differentiate_samples(const Samples& samples, int64_t count, const float* upstream, const float* value,
                           float* by_cell, int64_t width) {
  for (int64_t k = 0; k < count; ++k) {
    Floats products[4] = {};
    if (samples.cell[0][k] >= 0) {
      const float* rows[4];
      float* sums[4];
      Floats shares[4];
      for (int corner = 0; corner < 4; ++corner) {
        rows[corner] = value + samples.cell[corner][k] * width;
        sums[corner] = by_cell + samples.cell[corner][k] * width;
        shares[corner] = broadcast(samples.share[corner][k]);
      }
      for (int64_t c = 0; c < width; c += kLanes) {
        const Floats own = load(upstream + c);
        for (int corner = 0; corner < 4; ++corner) {
          products[corner] += own * load(rows[corner] + c);
          store(sums[corner] + c, load(sums[corner] + c) + shares[corner] * own);
        }
      }
    }
    add_lanes(products, samples.product, k);
  }
}

// Writes the gradients by the offsets and logits of a query and head from the products.
template <class Element>
void finish(const SampleLevels& levels, const Samples& samples, Element* by_offset, Element* by_logit) {
  Floats total{};
  const auto present = [&](int64_t k) { return lane_numbers() < static_cast<int32_t>(levels.samples - k); };
  for (int64_t k = 0; k < levels.stride; k += kLanes) {
    const Floats left = load(samples.x_share[0] + k), right = load(samples.x_share[1] + k);
    const Floats top = load(samples.y_share[0] + k), low = load(samples.y_share[1] + k);
    Floats product[4];
    for (int corner = 0; corner < 4; ++corner) {
      product[corner] = select(present(k), load(samples.product[corner] + k), Floats{});
    }
    const Floats weight = load(samples.weight + k);
    const Floats upper = left * product[0] + right * product[1], lower = left * product[2] + right * product[3];
    const Floats by_weight = top * upper + low * lower;
    store(samples.share[0] + k, by_weight);
    total += weight * by_weight;
    const Floats before = top * product[0] + low * product[2], behind = top * product[1] + low * product[3];
    const Ints inside = load_ints(samples.cell[0] + k) >= 0;
    const Floats by_x = load(samples.x_slope[0] + k) * before + load(samples.x_slope[1] + k) * behind;
    const Floats by_y = load(samples.y_slope[0] + k) * upper + load(samples.y_slope[1] + k) * lower;
    const Floats x = select(inside, weight * by_x, Floats{}), y = select(inside, weight * by_y, Floats{});
    const int64_t left_over = 2 * (levels.samples - k);
    store_elements(by_offset + 2 * k, alternate(x, y, 0), left_over);
    if (left_over > kLanes) {
      store_elements(by_offset + 2 * k + kLanes, alternate(x, y, kLanes / 2), left_over - kLanes);
    }
  }
  const Floats mean = broadcast(sum(total));
  for (int64_t k = 0; k < levels.stride; k += kLanes) {
    const Floats by_weight = load(samples.share[0] + k);
    store_elements(by_logit + k, load(samples.weight + k) * (by_weight - mean), levels.samples - k);
  }
}

template <class Element>
void differentiate(const DeformableAttention& attention, const SampleLevels& levels, const Element* upstream,
                   const Element* value, const Element* offsets, const Element* logits,
                   const DeformableGradients<Element>& gradients, int64_t image, int64_t head, float* scratch) {
  const int64_t heads = attention.heads, dim = attention.dim, stride = heads * dim;
  const int64_t width = round_to_panels_of_samples(dim);
  float* x = scratch;
  float* y = x + levels.stride;
  const Samples samples = arrays<true>(y + levels.stride, levels.stride);
  float* own = y + (1 + kBackwardArrays) * levels.stride;
  float* by_cell = own + width;
  float* own_value = by_cell + attention.cells * width;
  __builtin_memset(own, 0, sizeof(float) * (attention.cells + 1) * width);
  const int64_t first_cell = image * attention.cells * stride + head * dim;
  for (int64_t cell = 0; cell < attention.cells; ++cell) {
    prefetch(value + first_cell + (cell + kAhead < attention.cells ? cell + kAhead : cell) * stride, dim);
    for (int64_t c = 0; c < width; c += kLanes) {
      store(own_value + cell * width + c, load_elements(value + first_cell + cell * stride + c, dim - c));
    }
  }
  const int64_t end = (image + 1) * attention.queries;
  for (int64_t query = end - attention.queries; query < end; ++query) {
    const int64_t row = (query * heads + head) * levels.samples;
    const int64_t later = (query + kAhead < end ? query + kAhead : query) * heads + head;
    prefetch(upstream + later * dim, dim);
    prefetch(offsets + later * 2 * levels.samples, 2 * levels.samples);
    prefetch(logits + later * levels.samples, levels.samples);
    read_reference_points(attention, levels, query, x, y);
    prepare<true>(levels, offsets + 2 * row, logits + row, x, y, samples);
    const Element* upstream_row = upstream + query * stride + head * dim;
    for (int64_t c = 0; c < width; c += kLanes) store(own + c, load_elements(upstream_row + c, dim - c));
    differentiate_samples(samples, levels.samples, own, own_value, by_cell, width);
    finish(levels, samples, gradients.by_offset + 2 * row, gradients.by_logit + row);
  }
  for (int64_t cell = 0; cell < attention.cells; ++cell) {
    Element* target = gradients.by_value + first_cell + cell * stride;
    for (int64_t c = 0; c < dim; c += kLanes) {
      store_elements(target + c, load(by_cell + cell * width + c), dim - c);
    }
  }
}

}  // namespace

void attend_queries(const DeformableAttention& attention, const SampleLevels& levels, const float* value,
                    const float* offsets, const float* logits, float* result, int64_t first, int64_t last,
                    float* scratch) {
  attend(attention, levels, value, offsets, logits, result, first, last, scratch);
}

void attend_queries(const DeformableAttention& attention, const SampleLevels& levels, const uint16_t* value,
                    const uint16_t* offsets, const uint16_t* logits, uint16_t* result, int64_t first, int64_t last,
                    float* scratch) {
  attend(attention, levels, value, offsets, logits, result, first, last, scratch);
}

void differentiate_head(const DeformableAttention& attention, const SampleLevels& levels, const float* upstream,
                        const float* value, const float* offsets, const float* logits,
                        const DeformableGradients<float>& gradients, int64_t image, int64_t head, float* scratch) {
  differentiate(attention, levels, upstream, value, offsets, logits, gradients, image, head, scratch);
}

void differentiate_head(const DeformableAttention& attention, const SampleLevels& levels, const uint16_t* upstream,
                        const uint16_t* value, const uint16_t* offsets, const uint16_t* logits,
                        const DeformableGradients<uint16_t>& gradients, int64_t image, int64_t head, float* scratch) {
  differentiate(attention, levels, upstream, value, offsets, logits, gradients, image, head, scratch);
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
