use std::pin::Pin;

use proto::v1;
use proto::v1::experts_server::Experts;
use tonic::{Request, Response, Status, Streaming};

use crate::replies::Replies;
use crate::stage::Stage;

/// The tonic service of one shard of one model.
pub struct Server {
    stage: Stage,
}

impl Server {
    pub fn new(stage: Stage) -> Self {
        Self { stage }
    }
}

#[tonic::async_trait]
impl Experts for Server {
    type ComputeStream = Pin<Box<Replies>>;

    async fn compute(&self, request: Request<Streaming<v1::ExpertBatch>>) -> Result<Response<Self::ComputeStream>, Status> {
        Ok(Response::new(Box::pin(Replies::new(self.stage.clone(), request.into_inner()))))
    }

    async fn inspect(&self, _request: Request<v1::InspectExpertsRequest>) -> Result<Response<v1::InspectExpertsResponse>, Status> {
        let report = self.stage.report().ok_or_else(|| self.stage.crashed())?;
        let shape = self.stage.shape();
        Ok(Response::new(v1::InspectExpertsResponse {
            holdings: Some(report.held.holdings.clone()),
            layers: shape.layers.iter().map(|&layer| layer as u32).collect(),
            experts: shape.experts as u32,
            hidden_size: shape.hidden as u32,
            rows_by_expert: report.rows,
            batches: report.batches,
            weight_bytes: report.held.weight_bytes,
        }))
    }
}
