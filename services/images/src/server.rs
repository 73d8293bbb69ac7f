use proto::v1;
use proto::v1::images_server::Images;
use tonic::{Request, Response, Status};

use crate::error::Error;
use crate::stage::Stage;

/// The tonic service of one model.
pub struct Server {
    stage: Stage,
}

impl Server {
    pub fn new(stage: Stage) -> Self {
        Self { stage }
    }
}

#[tonic::async_trait]
impl Images for Server {
    async fn decode(&self, request: Request<v1::DecodeImageRequest>) -> Result<Response<v1::DecodeImageResponse>, Status> {
        let v1::DecodeImageRequest { codes, format, metadata, latent } = request.into_inner();
        let format = wire::sampling::format("format", format).map_err(Error::from)?;
        let drawing = wire::images::drawing(codes, latent.as_ref(), self.stage.canvas());
        let picture = self.stage.decode(drawing.map_err(Error::from)?, format, metadata.into_iter().collect()).await?;
        Ok(Response::new(v1::DecodeImageResponse {
            data: picture.data,
            media_type: picture.media_type.to_owned(),
            width: picture.width,
            height: picture.height,
        }))
    }
}
