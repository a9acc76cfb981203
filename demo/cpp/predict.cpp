// What an exported model sees in an image, by onnxruntime alone:
//   predict model.onnx image.ppm [least score] [folder of masks]
//
// The model is of `maskdino export --outputs instance --size HEIGHT WIDTH` and reads RGB
// (INPUT.FORMAT). One object a line: class, score, box x0 y0 x1 y1. To compile:
//   g++ -std=c++17 -I HEADERS predict.cpp libonnxruntime.so -o predict

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

using Shape = std::vector<int64_t>;

const OrtApi* ort = nullptr;

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string said = ort->GetErrorMessage(status);
  ort->ReleaseStatus(status);
  throw std::runtime_error(said);
}

// Released at the end of its block, also where an error leaves it.
template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

template <typename T, typename Create>
Owned<T> made(void (*release)(T*), Create create) {
  T* thing = nullptr;
  check(create(&thing));
  return {thing, release};
}

struct Image {
  int64_t height = 0, width = 0;
  std::vector<uint8_t> pixels;  // (height, width, 3) RGB
};

Image read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int largest = 0;
  Image image;
  file >> kind >> image.width >> image.height >> largest;
  if (kind != "P6" || largest != 255 || image.width < 1 || image.height < 1)
    throw std::runtime_error(path + " is no PPM image of 8 bits (P6, without comments)");
  file.get();
  image.pixels.resize(image.height * image.width * 3);
  if (!file.read(reinterpret_cast<char*>(image.pixels.data()), image.pixels.size()))
    throw std::runtime_error(path + " is cut off");
  return image;
}

// Height and width that the model reads.
std::array<int64_t, 2> canvas_of(OrtSession* session) {
  const auto type = made(ort->ReleaseTypeInfo, [&](OrtTypeInfo** it) {
    return ort->SessionGetInputTypeInfo(session, 0, it);
  });
  const OrtTensorTypeAndShapeInfo* info;
  std::array<int64_t, 4> shape{};
  check(ort->CastTypeInfoToTensorInfo(type.get(), &info));
  check(ort->GetDimensions(info, shape.data(), shape.size()));
  if (shape[2] < 1 || shape[3] < 1) throw std::runtime_error("export the model with --size");
  return {shape[2], shape[3]};
}

Owned<OrtValue> tensor(void* data, size_t bytes, const Shape& shape,
                       ONNXTensorElementDataType type) {
  const auto memory = made(ort->ReleaseMemoryInfo, [](OrtMemoryInfo** it) {
    return ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, it);
  });
  return made(ort->ReleaseValue, [&](OrtValue** it) {
    return ort->CreateTensorWithDataAsOrtValue(memory.get(), data, bytes, shape.data(),
                                               shape.size(), type, it);
  });
}

void predict(const char* model, const std::string& path, float least, const std::string& folder) {
  ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (ort == nullptr) throw std::runtime_error("this onnxruntime is older than its headers");
  const auto env = made(ort->ReleaseEnv, [](OrtEnv** it) {
    return ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "predict", it);
  });
  const auto options = made(ort->ReleaseSessionOptions,
                            [](OrtSessionOptions** it) { return ort->CreateSessionOptions(it); });
  const auto session = made(ort->ReleaseSession, [&](OrtSession** it) {
    return ort->CreateSession(env.get(), model, options.get(), it);
  });

  const Image image = read_ppm(path);
  const auto [height, width] = canvas_of(session.get());
  if (image.height > height || image.width > width)
    throw std::runtime_error(path + " is larger than the model's canvas; make it smaller");
  const std::array<float, 3> mean{123.675f, 116.28f, 103.53f};  // MODEL.PIXEL_MEAN, outside of it
  std::vector<float> canvas(3 * height * width);
  for (int64_t c = 0; c < 3; ++c)
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x)
        canvas[(c * height + y) * width + x] = y < image.height && x < image.width
                                                   ? image.pixels[(y * image.width + x) * 3 + c]
                                                   : mean[c];
  std::array<int64_t, 2> size{image.height, image.width};
  const auto images = tensor(canvas.data(), canvas.size() * sizeof(float), {1, 3, height, width},
                             ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  const auto sizes = tensor(size.data(), sizeof(size), {1, 2}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
  const OrtValue* inputs[] = {images.get(), sizes.get()};
  const char* input_names[] = {"images", "image_sizes"};
  const char* names[] = {"boxes", "scores", "labels", "masks"};
  OrtValue* outputs[4] = {};
  check(ort->Run(session.get(), nullptr, input_names, inputs, 2, names, 4, outputs));
  std::vector<Owned<OrtValue>> owned;
  for (OrtValue* output : outputs) owned.emplace_back(output, ort->ReleaseValue);

  void* data[4];
  for (int i = 0; i < 4; ++i) check(ort->GetTensorMutableData(outputs[i], &data[i]));
  const auto info = made(ort->ReleaseTensorTypeAndShapeInfo, [&](OrtTensorTypeAndShapeInfo** it) {
    return ort->GetTensorTypeAndShape(outputs[3], it);
  });
  std::array<int64_t, 4> shape{};  // of the masks: 1, objects, height, width
  check(ort->GetDimensions(info.get(), shape.data(), shape.size()));
  if (shape[2] != height || shape[3] != width)
    throw std::runtime_error("export the model with --mask-size full");
  const auto *boxes = static_cast<float*>(data[0]), *scores = static_cast<float*>(data[1]);
  const auto* labels = static_cast<int64_t*>(data[2]);
  const auto* masks = static_cast<bool*>(data[3]);
  for (int64_t n = 0; n < shape[1]; ++n) {
    if (scores[n] < least) continue;
    std::cout << labels[n] << ' ' << scores[n];
    for (int64_t i = 0; i < 4; ++i) std::cout << ' ' << boxes[4 * n + i];
    std::cout << '\n';
    if (folder.empty()) continue;
    const std::string name = folder + "/" + std::to_string(n) + ".pgm";
    std::ofstream file(name, std::ios::binary);
    file << "P5\n" << image.width << ' ' << image.height << "\n255\n";
    for (int64_t y = 0; y < image.height; ++y)
      for (int64_t x = 0; x < image.width; ++x)
        file.put(masks[(n * shape[2] + y) * shape[3] + x] ? '\xff' : '\0');
    if (!file.flush()) throw std::runtime_error(name + " cannot be written");
  }
}

int main(int count, char** words) {
  try {
    if (count < 3) throw std::runtime_error("predict model.onnx image.ppm [least score] [folder]");
    predict(words[1], words[2], count > 3 ? std::stof(words[3]) : 0.5f, count > 4 ? words[4] : "");
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}
