use mesh::{Mesh, Routes, Target};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

#[tokio::test]
async fn health_is_answered_in_process() {
    let mesh = Mesh::in_process();
    let target = Target::new("a", "b");
    let mut client = HealthClient::new(mesh.channel(&target));
    let refused = client.check(HealthCheckRequest::default()).await.expect_err("nobody serves yet");
    assert_eq!(refused.code(), tonic::Code::Unavailable);
    let serving = mesh.serve(target, Routes::new()).await.expect("it is offered");
    let answer = client.check(HealthCheckRequest::default()).await.expect("it is served");
    assert_eq!(answer.into_inner().status, 1);
    serving.drain(std::time::Duration::from_secs(1)).await;
}
