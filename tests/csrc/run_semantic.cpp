#include "run_operators.h"
#include "semantic/semantic.h"

namespace maskformer_fast {

void run_semantic(Random& random, int threads) {
  const int64_t images = random.integer(0, 2), queries = random.one_of<int64_t>({0, 1, 3, 20, 100, 130});
  const int64_t classes = random.one_of<int64_t>({1, 2, 19, 33, 150, 256});
  const int64_t map_height = random.integer(1, 12), map_width = random.integer(1, 12);
  const int64_t height = random.integer(1, 50), width = random.integer(1, 50);
  const bool extreme = random.chance(0.3), transposed = random.chance(0.3), half = random.chance(0.3);
  const double spread = random.one_of({1.0, 30.0});  // wide: few queries matter

  std::vector<float> masks = random.values<float>(images * queries * map_height * map_width, -spread, spread, extreme);
  std::vector<float> logits = random.values<float>(images * queries * (classes + 1), -spread, spread, extreme);
  std::vector<uint16_t> half_masks(half ? masks.size() : 0);
  for (uint16_t& bits : half_masks) bits = static_cast<uint16_t>(random.integer(0, 0xffff));
  std::vector<uint8_t> small(classes <= 255 ? images * height * width : 0, 0xee);
  std::vector<int16_t> wide(classes <= 255 ? 0 : images * height * width, 0x7777);
  const bool with_maps = random.chance(0.5);
  std::vector<float> scores(with_maps ? images * height * width : 0), margins(scores.size());

  SemanticBatch batch{};
  batch.masks = half ? static_cast<const void*>(half_masks.data()) : masks.data();
  batch.mask_type = half ? random.one_of({FloatType::float16, FloatType::bfloat16}) : FloatType::float32;
  batch.mask_sizes = {images, queries, map_height, map_width};
  batch.mask_strides = {queries * map_height * map_width, map_height * map_width, transposed ? 1 : map_width,
                        transposed ? map_height : 1};
  batch.logits = logits.data();
  batch.logit_type = FloatType::float32;
  batch.classes = classes;
  batch.logit_strides = {queries * (classes + 1), classes + 1, 1};
  batch.extent = {random.uniform(0.3, 1.2) * map_height, random.uniform(0.3, 1.0) * map_width};
  batch.output_size = {height, width};
  batch.labels = classes <= 255 ? static_cast<void*>(small.data()) : wide.data();
  batch.scores = with_maps ? scores.data() : nullptr;
  batch.margins = with_maps ? margins.data() : nullptr;
  batch.path = random.one_of({SemanticPath::automatic, SemanticPath::dense, SemanticPath::pruned});
  semantic_inference(batch, threads);

  for (const uint8_t label : small) MF_EXPECT(label < classes);
  for (const int16_t label : wide) MF_EXPECT(label >= 0 && label < classes);

  SemanticWindows windows{};
  windows.masks = batch.masks;
  windows.mask_type = batch.mask_type;
  windows.mask_sizes = batch.mask_sizes;
  windows.mask_strides = batch.mask_strides;
  windows.probabilities = logits.data();  // any values: negative ones are no probabilities, and not pruned by
  windows.classes = classes;
  std::vector<int64_t> origins;
  for (int64_t i = 0; i < images; ++i) {
    origins.push_back(random.integer(0, height - 1));
    origins.push_back(random.integer(0, width - 1));
  }
  windows.origins = origins.data();
  windows.window_size = {random.integer(1, 60), random.integer(1, 60)};
  windows.picture_size = {height, width};
  small.assign(classes <= 255 ? height * width : 0, 0xee);
  wide.assign(classes <= 255 ? 0 : height * width, 0x7777);
  windows.labels = classes <= 255 ? static_cast<void*>(small.data()) : wide.data();
  windowed_semantic(windows, threads);
  for (const uint8_t label : small) MF_EXPECT(label < classes);
  for (const int16_t label : wide) MF_EXPECT(label >= 0 && label < classes);
}

}  // namespace maskformer_fast
