use domain::Invalid;
use proto::v1;
use proto::v1::vision_server::Vision;
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
impl Vision for Server {
    async fn encode(&self, request: Request<v1::EncodeImageRequest>) -> Result<Response<v1::EncodeImageResponse>, Status> {
        let image = request.into_inner().image.ok_or_else(|| Error::from(Invalid::new("image", "missing")))?;
        let encoded = self.stage.encode(image.data).await?;
        let embeddings = v1::Embeddings { rows: encoded.rows as u32, width: encoded.width as u32, data: encoded.data };
        Ok(Response::new(v1::EncodeImageResponse { embeddings: Some(embeddings), cached: encoded.cached }))
    }
}
