// Panoptic and instance inference on the host: what each pixel of the output belongs to, in one pass over tiles of it.
//
// Low-resolution mask logits are resampled bilinearly (maskformer_fast/ops/resample.py says where each pixel reads
// them) in tiles of kTileRows x kTileColumns pixels. Bilinear values lie between the least and the largest of a tile's
// taps, so most tiles are settled from these bounds: one query is ahead of all others everywhere in it, or a mask
// covers all or nothing of it. Only the rest is worked on pixel by pixel, and only for the queries that matter there.
//
// NaN counts as the least logit, and logits beyond +-kLargestLogit (infinities too) as that.
#pragma once

#include <cstdint>

namespace maskformer_fast {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 64;  // one 64-bit word of a packed mask
constexpr int kTapSlack = 32;     // readable floats behind a row of taps: two of the widest vectors
constexpr float kLargestLogit = 1e30f;

// How output positions along one axis read the maps. Each tile has a list of the map positions it reads, ascending,
// in which the two taps of a position are neighbours (the last row or column stands there twice).
struct Axis {
  int64_t size;           // positions
  int64_t tiles;          // of `tile` positions; what is beyond `size` repeats the last position
  int tile;
  const int32_t* left;    // [tiles * tile] the first tap, as an index into the tile's list
  const float* weight;    // [tiles * tile] share of the second tap
  const int32_t* taps;    // [tiles, 2 * tile] the lists
  const int32_t* counts;  // [tiles] their lengths
  const int32_t* runs;    // [tiles] number of leading taps that are consecutive positions
};

struct MaskLogits {
  const float* data;  // [batch, queries, rows, columns], columns adjacent
  int64_t batch, queries;
  int64_t columns;                                 // of a map
  int64_t batch_stride, query_stride, row_stride;  // in floats
  Axis vertical, horizontal;
};

// One tile of one query, of which the maps' part is at hand.
struct alignas(64) TileScratch {
  float taps[2 * kTileRows][2 * kTileColumns + kTapSlack];
  float rows[2 * kTileRows][kTileColumns];  // the taps resampled along the columns
};

// What panoptic inference needs to know of a kept query; `slot` numbers the kept queries of an image.
struct Candidate {
  int64_t query;
  float inverse_score;
  float own_logit;  // the query owns the pixels whose logit is at least this
};

struct SlotCounts {
  int64_t won, owned, both;
};

// Scratch of one worker.
struct PanopticScratch {
  TileScratch tile;
  alignas(64) float cost[kTileRows * kTileColumns];      // least (1 + e^-logit) / score so far at each pixel
  alignas(64) float margin[kTileRows * kTileColumns];    // the winner's logit less its own_logit
  alignas(64) int32_t slot[kTileRows * kTileColumns];    // the winner
  float* column_low;   // [columns of a map] bounds of one candidate's logits in a row of tiles
  float* column_high;
  int64_t padded_slots;  // the kept queries of any image, to a multiple of the widest vector
  float* low;            // [tiles across, padded_slots] bounds of each candidate's logits in a tile
  float* high;
  float* best;     // [padded_slots] bounds of its cost
  float* worst;
  int32_t* alive;  // [padded_slots] candidates that may win somewhere in the tile
  SlotCounts* counts;  // [batch, slots] sums over this worker's tiles
};

struct PanopticJob {
  MaskLogits logits;
  const Candidate* candidates;  // [batch, slots]
  const int64_t* slot_counts;   // [batch] kept queries
  int64_t slots;                // kept queries of any image at most
  bool intersect;               // a segment is what its query won and owns
  int32_t* id_map;              // [batch, height, width]; holds slots until `number_segments`
  int32_t* tile_slot;           // [batch, tiles down, tiles across] the slot of all of a tile, or kMixedTile
  const int32_t* ids;           // [batch, slots + 1] segment of each slot; the last slot is of no query
};

constexpr int32_t kMixedTile = -1;

struct InstanceScratch {
  TileScratch tile;
  float* column_low;  // [columns of a map] bounds of the query's logits in a row of tiles
  float* column_high;
};

struct InstanceJob {
  MaskLogits logits;
  uint8_t* masks;   // [batch, queries, height, ceil(width / 8)]
  int64_t* areas;   // [batch, queries]
  float* boxes;     // [batch, queries, 4]
  float* scores;    // [batch, queries]
};

// For each instruction set (cpu_isa.h).
#define MF_DECLARE_SEGMENT_KERNELS(ISA)                                                                          \
  namespace ISA {                                                                                                \
  /* Gives the pixels of one row of tiles to their winners and counts. */                                        \
  void claim_pixels(const PanopticJob& job, int64_t image, int64_t tile_row, PanopticScratch& scratch);          \
  /* Replaces slots by segment numbers in one row of tiles. */                                                   \
  void number_segments(const PanopticJob& job, int64_t image, int64_t tile_row);                                 \
  /* One query's mask with its area, box and score. */                                                           \
  void extract_mask(const InstanceJob& job, int64_t image, int64_t query, InstanceScratch& scratch);             \
  }
MF_DECLARE_SEGMENT_KERNELS(baseline)
#if defined(__x86_64__)
MF_DECLARE_SEGMENT_KERNELS(avx2)
MF_DECLARE_SEGMENT_KERNELS(avx512)
#endif
#undef MF_DECLARE_SEGMENT_KERNELS

}  // namespace maskformer_fast
