//! Compression of answers: what the client accepts is asked before anything changes the request, the answer's body is
//! compressed as it passes.
use crate::body::{Body, BodyError};
use crate::phase::Exchange;
use bytes::Bytes;
use http::{HeaderMap, Method, Response, header};
use http_body::{Body as HttpBody, Frame};
use http_body_util::BodyExt as _;
use mesh_model::l7::compression::{Coding, Compression};
use std::io::{self, Write};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

/// Input taken at once: what is made of it is handed on before more is read.
const SLICE: usize = 16 << 10;
/// Levels and windows, as Envoy has them by default but for zstd's window, which would be 2 MiB: what a stream costs in memory
/// is bounded (gzip and brotli some 300 KiB, zstd 700 KiB).
const GZIP_LEVEL: u32 = 6;
const BROTLI_LEVEL: u32 = 3;
const WINDOW_BITS: u32 = 18;
const ZSTD_LEVEL: i32 = 3;

/// Remembers what the client accepts.
pub(crate) fn prepare(ex: &mut Exchange<'_>) {
    let Some(compression) = ex.treatments.compression() else { return };
    ex.coding = compression.choose(&ex.parts.headers);
    if compression.hide_accept {
        ex.parts.headers.remove(header::ACCEPT_ENCODING);
    }
}

/// Compresses the answer, if it is one to compress and the client accepts it.
pub(crate) fn apply(ex: &Exchange<'_>, mut answer: Response<Body>) -> Response<Body> {
    let Some(compression) = ex.treatments.compression().map(Arc::as_ref) else { return answer };
    if !compression.concerns(answer.status(), answer.headers(), answer.body().size_hint().exact()) {
        return answer;
    }
    Compression::vary(answer.headers_mut());
    let coding = ex.coding.filter(|_| ex.parts.method != Method::HEAD && !answer.body().is_end_stream());
    let Some((coding, encoder)) = coding.and_then(|c| Some((c, Encoder::new(c).ok()?))) else { return answer };
    Compression::mark(coding, answer.headers_mut());
    answer.map(|inner| Body::Boxed(Compressed::new(inner, encoder).boxed_unsync()))
}

/// A body that is compressed as it is read. What the upstream has sent is handed on as soon as it sends nothing more for now.
struct Compressed {
    inner: Body,
    /// `None` at the end.
    encoder: Option<Encoder>,
    /// Read and not yet compressed.
    input: Bytes,
    /// Compressed, and perhaps still held back by the encoder.
    unflushed: bool,
    trailers: Option<HeaderMap>,
}
impl Compressed {
    fn new(inner: Body, encoder: Encoder) -> Self {
        Self { inner, encoder: Some(encoder), input: Bytes::new(), unflushed: false, trailers: None }
    }
}
impl HttpBody for Compressed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        loop {
            let Some(encoder) = &mut this.encoder else {
                return Poll::Ready(this.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))));
            };
            let made = if this.input.is_empty() {
                let polled = Pin::new(&mut this.inner).poll_frame(cx);
                if polled.is_pending() && this.unflushed {
                    this.unflushed = false;
                    encoder.flush()
                } else {
                    match ready!(polled) {
                        Some(Ok(frame)) => match frame.into_data() {
                            Ok(data) => {
                                this.input = data;
                                continue;
                            }
                            Err(frame) => {
                                this.trailers = frame.into_trailers().ok();
                                this.encoder.take().map_or(Ok(Bytes::new()), Encoder::finish)
                            }
                        },
                        None => this.encoder.take().map_or(Ok(Bytes::new()), Encoder::finish),
                        Some(Err(error)) => {
                            this.encoder = None;
                            return Poll::Ready(Some(Err(error)));
                        }
                    }
                }
            } else {
                let slice = this.input.split_to(this.input.len().min(SLICE));
                this.unflushed = true;
                encoder.write(&slice)
            };
            match made {
                Ok(made) if made.is_empty() => {}
                Ok(made) => return Poll::Ready(Some(Ok(Frame::data(made)))),
                Err(_) => {
                    this.encoder = None;
                    return Poll::Ready(Some(Err(BodyError::Gone("the answer could not be compressed"))));
                }
            }
        }
    }
    fn is_end_stream(&self) -> bool {
        self.encoder.is_none() && self.trailers.is_none()
    }
}

/// The encoders write into a buffer that is taken from them again and again.
enum Encoder {
    Gzip(Box<flate2::write::GzEncoder<Vec<u8>>>),
    Brotli(Box<brotli::CompressorWriter<Vec<u8>>>),
    Zstd(zstd::stream::write::Encoder<'static, Vec<u8>>),
}
impl Encoder {
    fn new(coding: Coding) -> io::Result<Self> {
        Ok(match coding {
            Coding::Gzip => Self::Gzip(Box::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(GZIP_LEVEL)))),
            Coding::Brotli => Self::Brotli(Box::new(brotli::CompressorWriter::new(Vec::new(), SLICE, BROTLI_LEVEL, WINDOW_BITS))),
            Coding::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), ZSTD_LEVEL)?;
                encoder.window_log(WINDOW_BITS)?;
                Self::Zstd(encoder)
            }
        })
    }
    fn write(&mut self, data: &[u8]) -> io::Result<Bytes> {
        match self {
            Self::Gzip(e) => e.write_all(data)?,
            Self::Brotli(e) => e.write_all(data)?,
            Self::Zstd(e) => e.write_all(data)?,
        }
        Ok(self.take())
    }
    /// Everything written so far can be read from what was handed out.
    fn flush(&mut self) -> io::Result<Bytes> {
        match self {
            Self::Gzip(e) => e.flush()?,
            Self::Brotli(e) => e.flush()?,
            Self::Zstd(e) => e.flush()?,
        }
        Ok(self.take())
    }
    fn finish(self) -> io::Result<Bytes> {
        Ok(match self {
            Self::Gzip(e) => e.finish()?,
            Self::Brotli(e) => e.into_inner(),
            Self::Zstd(e) => e.finish()?,
        }
        .into())
    }
    fn take(&mut self) -> Bytes {
        std::mem::take(match self {
            Self::Gzip(e) => e.get_mut(),
            Self::Brotli(e) => e.get_mut(),
            Self::Zstd(e) => e.get_mut(),
        })
        .into()
    }
}

#[cfg(test)]
mod tests;
