// Decodes image files, as step3_infer.py does. Include it once: it defines stb_image's functions.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "problem.h"
#include "text.h"

using std::string;

constexpr int64_t MAX_SIDE = 65535;        // pixels; the limit of JPEG
constexpr int64_t MAX_PIXELS = 178956970;  // Pillow's limit; --max-pixels changes it
constexpr int MAX_SCANS = 200;             // of a JPEG, each of which takes as long as an image

// ------------------------------------------------------------------------------------- memory

// What stb_image may allocate for an image. A file may inflate to any size, whatever it says about
// its pixels; the largest honest one is a PNG of RGBA in 16 bits that cannot be compressed.
constexpr size_t BYTES_PER_PIXEL = 32;
constexpr size_t BYTES_PER_IMAGE = size_t(64) << 20;

// Allocates for stb_image, and refuses what is over the budget.
class Budget {
  // Its size is in front of each block, at the distance that keeps blocks aligned.
  static constexpr size_t FRONT = alignof(std::max_align_t);
  static_assert(FRONT >= sizeof(size_t));

  size_t left = 0;

 public:
  // Since the last start(): whether something was over the budget, or more than the machine had.
  bool exceeded = false;
  bool out_of_memory = false;

  void start(size_t bytes) {
    left = bytes;
    exceeded = false;
    out_of_memory = false;
  }

  void* allocate(size_t size) { return reallocate(nullptr, size); }

  // As std::realloc.
  void* reallocate(void* block, size_t size) {
    char* const old = block ? static_cast<char*>(block) - FRONT : nullptr;
    const size_t old_size = old ? *reinterpret_cast<size_t*>(old) : 0;
    if (size > left + old_size) {
      exceeded = true;
      return nullptr;
    }

    auto* const grown = static_cast<char*>(std::realloc(old, size + FRONT));
    if (!grown) {
      out_of_memory = true;
      return nullptr;
    }

    *reinterpret_cast<size_t*>(grown) = size;
    left += old_size;
    left -= size;
    return grown + FRONT;
  }

  void release(void* block) {
    if (!block) return;

    char* const start = static_cast<char*>(block) - FRONT;
    left += *reinterpret_cast<size_t*>(start);
    std::free(start);
  }
};

inline Budget budget;  // one image is decoded at a time

#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_ONLY_BMP
#define STBI_ONLY_GIF
#define STBI_MALLOC(size) budget.allocate(size)
#define STBI_REALLOC(block, size) budget.reallocate(block, size)
#define STBI_FREE(block) budget.release(block)
#include <stb_image.h>

// ------------------------------------------------------------------------------------- images

struct Image {
  int height;
  int width;
  std::vector<uint8_t> pixels;  // [height, width, channels]
};

// What stb_image reads from. It reads zeros beyond the end, so `ended` records whether it read that
// far.
struct Source {
  const string& bytes;
  size_t at = 0;
  bool ended = false;
};

inline const stbi_io_callbacks READER = {
    [](void* user, char* data, int size) {
      auto& source = *static_cast<Source*>(user);
      const size_t count = source.bytes.copy(data, size, source.at);
      source.ended = source.ended || count == 0;
      source.at += count;
      return int(count);
    },
    [](void* user, int count) {
      auto& source = *static_cast<Source*>(user);
      source.at = std::min(source.at + count, source.bytes.size());
    },
    [](void* user) {
      const auto& source = *static_cast<Source*>(user);
      return int(source.at == source.bytes.size());
    }};

// Reads whole numbers of an image file; beyond its end there are zeros.
struct Numbers {
  const string& bytes;

  // `count` bytes at i, the highest first, or the lowest first.
  size_t operator()(size_t i, int count, bool lowest_first = false) const {
    size_t value = 0;
    for (int k = 0; k < count; k++) {
      const size_t at = lowest_first ? i + count - 1 - k : i + k;
      const uint8_t byte = at < bytes.size() ? bytes[at] : 0;
      value = value << 8 | byte;
    }
    return value;
  }
};

// Where the EXIF block of a JPEG or PNG starts; 0 if it has none.
inline size_t find_exif(const string& bytes) {
  const Numbers number{bytes};

  if (number(0, 2) == 0xFFD8) {  // JPEG: marker, length, content; the pixels start at marker FFDA
    size_t i = 2;
    while (number(i, 1) == 0xFF && number(i, 2) != 0xFFDA) {
      const bool is_exif = number(i, 2) == 0xFFE1 && number(i + 4, 6) == 0x457869660000;  // "Exif"
      if (is_exif) return i + 10;
      i += 2 + number(i + 2, 2);
    }
  }

  if (number(0, 4) == 0x89504E47) {  // PNG: length, name, content, checksum
    for (size_t i = 8; i < bytes.size(); i += 12 + number(i, 4))
      if (number(i + 4, 4) == 0x65584966) return i + 8;  // "eXIf"
  }
  return 0;
}

// The EXIF orientation of a JPEG or PNG, from 1 (upright) to 8.
inline int exif_orientation(const string& bytes) {
  const size_t exif = find_exif(bytes);
  if (!exif) return 1;

  const Numbers number{bytes};
  const bool lowest_first = number(exif, 1) == 'I';
  const size_t directory = exif + number(exif + 4, 4, lowest_first);
  const size_t count = number(directory, 2, lowest_first);
  for (size_t k = 0; k < count; k++) {
    const size_t entry = directory + 2 + 12 * k;
    if (number(entry, 2, lowest_first) != 0x0112) continue;

    const size_t value = number(entry + 8, 2, lowest_first);
    return value >= 1 && value <= 8 ? int(value) : 1;
  }
  return 1;
}

// Pixels of `components` bytes (grey, grey + alpha, RGB, RGB + alpha) -> upright Image of 1 or 3
// channels; orientation: that of EXIF.
inline Image upright(const uint8_t* pixels, int height, int width, int components, int channels,
                     int orientation) {
  const bool swap = orientation >= 5;
  const bool from_below =
      orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  const bool from_right =
      orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;

  Image image{swap ? width : height, swap ? height : width, {}};
  image.pixels.resize(size_t(height) * width * channels);
  uint8_t* out = image.pixels.data();
  const int step = components < 3 ? 0 : 1;  // red, green and blue of a grey pixel are the same byte
  for (int y = 0; y < image.height; y++) {
    for (int x = 0; x < image.width; x++) {
      size_t row = swap ? x : y;
      size_t column = swap ? y : x;
      if (from_below) row = height - 1 - row;
      if (from_right) column = width - 1 - column;

      const uint8_t* p = pixels + (row * width + column) * components;
      if (channels == 3) {
        for (int k = 0; k < 3; k++) out[k] = p[k * step];
      } else {  // ITU-R 601-2 luma in Pillow's fixed point
        *out = (19595 * p[0] + 38470 * p[step] + 7471 * p[2 * step] + 0x8000) >> 16;
      }
      out += channels;
    }
  }
  return image;
}

// Throws Problem for an image that is too large, or that takes too long to decode.
inline void check_limits(const string& bytes, int64_t width, int64_t height, int64_t max_pixels) {
  const int64_t side = std::max(width, height);
  if (side > MAX_SIDE)
    throw Problem("has a side of " + grouped(side) + " pixels, more than " + grouped(MAX_SIDE));
  if (width * height > max_pixels)
    throw Problem("has " + grouped(width) + " x " + grouped(height) +
                  " pixels, more than --max-pixels " + grouped(max_pixels));

  if (bytes.compare(0, 2, "\xFF\xD8") != 0) return;
  // In the data of a scan, 0xFF is followed by 0 or a restart marker only.
  int scans = 0;
  size_t at = 0;
  while ((at = bytes.find("\xFF\xDA", at)) != string::npos) {
    scans++;
    at += 2;
  }
  if (scans > MAX_SCANS)
    throw Problem("is a JPEG of " + grouped(scans) + " scans, more than " + grouped(MAX_SCANS) +
                  ": save it anew");
}

// Why stb_image could not decode a file. It does not always say itself that memory was lacking.
inline string failure() {
  if (budget.exceeded) return "is corrupt: it takes more memory than an image of its size";
  if (budget.out_of_memory) return "is too large for this machine's memory";
  return string("is corrupt or truncated: ") + stbi_failure_reason();
}

// What the first bytes of an image file say.
struct Header {
  int width = 0;
  int height = 0;
  bool is_wide = false;  // whether it has greys of 16 bits
};

// Throws Problem for what stb_image cannot read, or what is over the limits.
inline Header read_header(const string& bytes, int64_t max_pixels) {
  budget.start(BYTES_PER_IMAGE);

  Header header;
  int components = 0;
  Source source{bytes};
  const bool is_known = stbi_info_from_callbacks(&READER, &source, &header.width, &header.height,
                                                 &components);
  if (!is_known || header.width < 1 || header.height < 1)
    throw Problem("is damaged, too large or not a PNG, JPEG, BMP or GIF image"
                  " that stb_image can read");
  check_limits(bytes, header.width, header.height, max_pixels);

  Source again{bytes};
  header.is_wide = components == 1 && stbi_is_16_bit_from_callbacks(&READER, &again);
  return header;
}

// Scales greys of 16 bits in place to 8 bits, so that `white` becomes 255.
inline void scale_to_8_bits(void* pixels, size_t count, uint32_t white) {
  const auto* wide = static_cast<const uint16_t*>(pixels);
  auto* scaled = static_cast<uint8_t*>(pixels);
  for (size_t k = 0; k < count; k++)
    scaled[k] = (std::min<uint32_t>(wide[k], white) * 255 + white / 2) / white;
}

// The bytes of an image file -> Image; channels is 1 (grey) or 3 (RGB), alpha is dropped. white:
// the level of 16-bit greys that becomes 255. Throws Problem with the reason (the caller knows the
// name), std::bad_alloc.
inline Image decode(const string& bytes, int channels, uint32_t white, int64_t max_pixels) {
  if (bytes.empty()) throw Problem("is empty");
  const Header header = read_header(bytes, max_pixels);
  const size_t count = size_t(header.width) * header.height;
  budget.start(BYTES_PER_IMAGE + BYTES_PER_PIXEL * count);

  // As with Pillow and step3: 16-bit greys are scaled, and 16-bit colours are reduced to their high
  // byte.
  Source source{bytes};
  int width = 0;
  int height = 0;
  int components = 0;
  void* pixels = nullptr;
  if (header.is_wide)
    pixels = stbi_load_16_from_callbacks(&READER, &source, &width, &height, &components, 1);
  else
    pixels = stbi_load_from_callbacks(&READER, &source, &width, &height, &components, 0);

  const std::unique_ptr<void, decltype(&stbi_image_free)> owner(pixels, stbi_image_free);
  if (!pixels) throw Problem(failure());
  if (source.ended) throw Problem("is truncated");
  if (width != header.width || height != header.height)
    throw Problem("is corrupt: it has two sizes");

  if (header.is_wide) scale_to_8_bits(pixels, count, white);
  const auto* bytes_of_pixels = static_cast<const uint8_t*>(pixels);
  return upright(bytes_of_pixels, height, width, components, channels, exif_orientation(bytes));
}
