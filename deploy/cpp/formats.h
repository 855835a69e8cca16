// Which formats image files have, by their names and by their first bytes.

#pragma once

#include <string>
#include <vector>

using std::string;

// The suffixes of step3_infer.py. A file of a kind that this program cannot read is an error line,
// it is not skipped.
inline const string IMAGE_SUFFIXES =
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .bmp .gif .pgm .ppm .pbm .pnm .webp .tif .tiff"
    " .avif .avifs .jp2 .j2k .jpc .jpf .jpx .j2c .tga .icb .vda .vst .dib .ico .pcx .qoi"
    " .sgi .rgb .rgba .bw .dds .heic .heics .heif .heifs .hif";

// Whether `start` is at place `at` of a text.
inline bool starts_with(const string& text, const string& start, size_t at = 0) {
  return at <= text.size() && text.compare(at, start.size(), start) == 0;
}

// The name of an image file's format by its first bytes; "" for an unknown one.
inline string format_of(const string& bytes) {
  struct Signature {
    size_t at;
    string start;
    string name;
  };
  static const std::vector<Signature> signatures = {
      {0, "\x89PNG", "PNG"},
      {0, "\xFF\xD8", "JPEG"},
      {0, "BM", "BMP"},
      {0, "GIF8", "GIF"},
      {0, string("II*\0", 4), "TIFF"},
      {0, string("MM\0*", 4), "TIFF"},
      {0, string("II+\0", 4), "TIFF"},
      {0, string("MM\0+", 4), "TIFF"},
      {8, "WEBP", "WebP"},
      {4, "ftypavi", "AVIF"},
      {4, "ftyp", "HEIF"},
      {4, "jP  ", "JPEG 2000"},
      {0, "\xFF\x4F\xFF\x51", "JPEG 2000"},
      {0, "qoif", "QOI"},
      {0, "DDS ", "DDS"},
      {0, "\x01\xDA", "SGI"},
      {0, string("\0\0\1\0", 4), "ICO"},
      {0, string("(\0\0\0", 4), "DIB"},
  };
  for (const auto& [at, start, name] : signatures)
    if (starts_with(bytes, start, at)) return name;

  if (bytes.size() < 3) return "";
  const bool is_pnm = bytes[0] == 'P' && bytes[1] >= '1' && bytes[1] <= '7' && bytes[2] <= ' ';
  if (is_pnm) return "PNM";
  const bool is_pcx = bytes[0] == '\n' && bytes[1] >= 0 && bytes[1] <= 5 && bytes[2] == 1;
  if (is_pcx) return "PCX";

  const string tga_end("TRUEVISION-XFILE.\0", 18);  // its start may be anything
  const bool is_tga = bytes.size() > 18 && starts_with(bytes, tga_end, bytes.size() - 18);
  return is_tga ? "TGA" : "";
}
